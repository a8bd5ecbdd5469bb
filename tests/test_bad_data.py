"""A corpus of bad files: each has a stated outcome. It is used, or left out with a reason, or refused in a sentence.

In no case is a file of the user's touched, a pipe waited for, or a picture of 3.6 gigapixels allocated.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from badfiles import (
    DEEP,
    LAUGHS,
    MORE,
    RGB,
    SECRET,
    SIZE,
    cut,
    encoded,
    linked,
    make_classes,
    make_tagged,
    masked,
    odd_exif,
    outside,
    png,
    state_of,
    time_limit,
    turned,
    written,
)  # fmt: skip
from PIL import Image
from trees import save_image, scene

from mcic.data.fence import Fence
from mcic.data.folder import Folder, read_folder
from mcic.data.image_names import file_name
from mcic.data.images import read_image
from mcic.data.palette import voc_palette
from mcic.data.tags import read_table
from mcic.model import NetworkSpec, SegmentationNetwork
from mcic.predict import Predictor
from mcic.predictions import find_images, predict_files
from mcic.untrusted import parse_json

AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")


@dataclass(frozen=True)
class Case:
    """A bad file, and what becomes of it.

    Attributes:
        make: called with the folder of the data, in which eight good photographs are.
        used: id → size (H, W) of the images that are there beside the good ones.
        left: kinds and names of what is left out, and a part of the reason.
        refused: a pattern of the sentence that ends it.
        settings: of `read_folder`.
    """

    make: Callable[[Path], object]
    used: dict[str, tuple[int, int]] = field(default_factory=dict)
    left: tuple[tuple[str, str, str], ...] = ()
    refused: str | None = None
    settings: dict = field(default_factory=dict)


def check(case: Case, root: Path, good: set[str]) -> None:
    case.make(root)
    before = state_of(root)
    with time_limit():
        if case.refused is not None:
            with pytest.raises((ValueError, OSError), match=case.refused) as caught:
                read_folder(root, 0.3, **case.settings)
            assert len(str(caught.value)) < 1000
        else:
            contents = read_folder(root, 0.3, **case.settings)
            photos = {photo.id: photo for photo in (*contents.train, *contents.val)}
            assert {name: photo.facts.size for name, photo in photos.items() if name not in good} == case.used
            assert good <= photos.keys()
            small = {name: size for name, size in case.used.items() if np.prod(size) < 10**6}
            assert all(read_image(photos[name].path).shape[:2] == size for name, size in small.items())
            left = [(entry.kind, Path(entry.name).name, entry.reason) for entry in contents.dropped]
            assert [entry[:2] for entry in left] == [entry[:2] for entry in case.left]
            assert all(part in reason for (*_, reason), (*_, part) in zip(left, case.left, strict=True)), left
    assert state_of(root) == before


# Files in a folder of classes


def saved(name: str, image: Image.Image, **options) -> Callable[[Path], None]:
    return lambda root: image.save(root / "ant" / name, **options)


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 12), "red")]}

IMAGES = {
    "cut JPEG": Case(written("x.jpg", cut("JPEG")), left=(("broken", "x.jpg", "truncated"),)),
    "cut PNG": Case(written("x.png", cut("PNG")), left=(("broken", "x.png", "truncated"),)),
    "garbage": Case(written("x.jpg", bytes(range(256)) * 9), left=(("broken", "x.jpg", "cannot identify"),)),
    "a web page": Case(written("x.jpg", b"<html>404</html>"), left=(("broken", "x.jpg", "cannot identify"),)),
    "empty": Case(written("x.png", b""), left=(("broken", "x.png", "cannot identify"),)),
    "zero width": Case(written("x.png", png(0, 4)), left=(("broken", "x.png", ""),)),
    "PostScript": Case(
        written("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
        left=(("broken", "x.jpg", "cannot identify"),),
    ),
    "PostScript by name": Case(written("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), left=(("kind", "x.eps", ".eps"),)),
    "floating point": Case(
        saved("x.tif", Image.fromarray(np.ones((4, 4), np.float32))), left=(("broken", "x.tif", "floating-point"),)
    ),
    "wrong ending": Case(written("x.jpg", encoded(RGB)), used={"ant__x": SIZE}),
    "CMYK": Case(saved("x.jpg", RGB.convert("CMYK")), used={"ant__x": SIZE}),
    "16 bits": Case(saved("x.png", Image.fromarray(np.full(SIZE, 999, np.uint16))), used={"ant__x": SIZE}),
    "palette": Case(saved("x.png", RGB.quantize(9), transparency=1), used={"ant__x": SIZE}),
    "turned by EXIF": Case(saved("x.jpg", turned(), exif=turned().getexif()), used={"ant__x": (16, 12)}),
    "broken EXIF": Case(saved("x.jpg", RGB, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), used={"ant__x": SIZE}),
    "EXIF of odd types": Case(saved("x.jpg", RGB, exif=odd_exif(6)), used={"ant__x": (16, 12)}),
    "EXIF that is none": Case(saved("x.png", RGB, exif=b"Exif\0\0no such block"), used={"ant__x": SIZE}),
    "no palette": Case(
        written("x.png", png(16, 12, rows=12, colours=3)), left=(("broken", "x.png", "AssertionError"),)
    ),
    "animated GIF": Case(saved("x.gif", RGB, **FRAMES), used={"ant__x": SIZE}),
    "animated WebP": Case(saved("x.webp", RGB, **FRAMES), used={"ant__x": SIZE}),
    "animated PNG": Case(saved("x.png", RGB, **FRAMES), used={"ant__x": SIZE}),
    "one pixel": Case(saved("x.png", Image.new("RGB", (1, 1))), used={"ant__x": (1, 1)}),
    "100 megapixels": Case(written("x.png", png(10_000, 10_001, rows=10_001)), used={"ant__x": (10_001, 10_000)}),
    "3.6 gigapixels": Case(
        written("x.png", png(60_000, 60_000)), left=(("broken", "x.png", "exceeds limit of 178956970"),)
    ),
    "4 exapixels": Case(written("x.png", png(2**31 - 1, 2**31 - 1)), left=(("broken", "x.png", "exceeds limit"),)),
    "gigapixels of PPM": Case(written("x.ppm", b"P6 60000 60000 255\n"), left=(("broken", "x.ppm", "exceeds limit"),)),
    "just too large": Case(written("x.png", png(20_000, 8_948)), left=(("broken", "x.png", "exceeds limit"),)),
    "just small enough": Case(written("x.png", png(19_999, 8_948)), left=(("broken", "x.png", "truncated"),)),
}
LONG = "x" * 250
NAMES = {
    "spaces": Case(written("a b .png", encoded(RGB)), used={"ant__a b ": SIZE}),
    "a leading dash": Case(written("-rf.png", encoded(RGB)), used={"ant__-rf": SIZE}),
    "quotes": Case(written("""'"`$(x).png""", encoded(RGB)), used={"""ant__'"`$(x)""": SIZE}),
    "decomposed": Case(written("cafe\u0301.png", encoded(RGB)), used={"ant__café": SIZE}),
    "a line break": Case(written("a\nb.png", encoded(RGB)), used={file_name("ant/a\nb"): SIZE}),
    "an escape sequence": Case(written("\x1b[2J.png", encoded(RGB)), used={file_name("ant/\x1b[2J"): SIZE}),
    "no UTF-8": Case(written(b"caf\xe9.png", encoded(RGB)), used={file_name("ant/caf\udce9"): SIZE}),
    "255 bytes": Case(written(f"{LONG}.png", encoded(RGB)), used={file_name(f"ant/{LONG}"): SIZE}),
    "markup": Case(
        written("<script>alert(1)<\u2215script>.png", encoded(RGB)), used={"ant__<script>alert(1)<∕script>": SIZE}
    ),
    "two spellings of one name": Case(
        lambda root: [written(name, encoded(RGB))(root) for name in ("café.png", "cafe\u0301.png")],
        refused="several images of the id 'ant__café.png'",
    ),
    "two formats of one picture": Case(
        lambda root: [saved(name, RGB)(root) for name in ("x.jpg", "x.png")],
        used={"ant__x.jpg": SIZE, "ant__x.png": SIZE},
    ),
    "a class that is no text": Case(
        written(b"../caf\xe9/x.png", encoded(RGB)), refused=r"caf\\udce9, which no UTF-8 file"
    ),
    "a class with a line break": Case(written("../a\x07b/x.png", encoded(RGB)), refused=r"a\\x07b, which no UTF-8"),
    "a class called background": Case(
        written("../background/x.png", encoded(RGB)), refused="names a class 'background'"
    ),
}


FOLLOW = {"follow_links": True}
LINKS = {
    "to a file inside": Case(linked("ant/x.png", "../bee/1.png"), used={"ant__x": SIZE}),
    "to a file outside": Case(linked("ant/x.png", SECRET), left=(("link", "x.png", "--data.follow-links allows it"),)),
    "to a file outside, allowed": Case(linked("ant/x.png", SECRET), used={"ant__x": SIZE}, settings=FOLLOW),
    "up and out": Case(
        lambda root: [outside(root), linked("ant/x.png", "../../outside/more/secret.png")(root)],
        left=(("link", "x.png", "leads out of"),),
    ),
    "to nothing": Case(linked("ant/x.png", "gone.png"), left=(("link", "x.png", "leads nowhere"),)),
    "to itself": Case(linked("ant/x.png", "x.png"), left=(("link", "x.png", "leads nowhere"),)),
    "to a device": Case(linked("ant/x.png", "/dev/zero"), left=(("link", "x.png", "leads out of"),)),
    "to a device, allowed": Case(linked("ant/x.png", "/dev/zero"), left=(("special", "x.png", ""),), settings=FOLLOW),
    "to a folder inside": Case(
        linked("ant/all", "../bee"), left=(("link", "all", "lies within the data, and counts there"),)
    ),
    "round in a circle": Case(linked("ant/all", "."), left=(("link", "all", "read anyway"),), settings=FOLLOW),
    "to a folder outside": Case(linked("ant/more", MORE), left=(("link", "more", "leads out of"),)),
    "to a folder outside, allowed": Case(linked("ant/more", MORE), used={"ant__more__secret": SIZE}, settings=FOLLOW),
    "in a circle outside, allowed": Case(
        lambda root: [linked("ant/more", MORE)(root), (root.parent / "outside/more/again").symlink_to(".")],
        used={"ant__more__secret": SIZE},
        left=(("link", "again", "read anyway"),),
        settings=FOLLOW,
    ),
    "a class outside": Case(linked("cat", MORE), refused="cat leads out of .*--data.follow-links allows it"),
    "a class outside, allowed": Case(linked("cat", MORE), used={"cat__secret": SIZE}, settings=FOLLOW),
    "classes.txt outside": Case(linked("classes.txt", "/etc/hostname"), refused="classes.txt leads out of"),
    "a pipe": Case(lambda root: os.mkfifo(root / "ant" / "x.jpg"), left=(("special", "x.jpg", "no file"),)),
    "classes.txt is a pipe": Case(lambda root: os.mkfifo(root / "classes.txt")),
    "a folder called x.jpg": Case(lambda root: (root / "ant" / "x.jpg").mkdir()),
}


@pytest.mark.parametrize("case", [*IMAGES.values(), *NAMES.values(), *LINKS.values()], ids=[*IMAGES, *NAMES, *LINKS])
def test_images_names_and_links(tmp_path, case):
    check(case, tmp_path / "data", make_classes(tmp_path / "data"))


def test_a_link_to_another_part_of_the_data_says_what_becomes_of_it(tmp_path):
    """Also of a part that nothing else reads."""
    for name in ("../images/a.png", "../images/below/b.png", "../more/c.png"):
        written(name, encoded(RGB))(tmp_path)
    (tmp_path / "images" / "linked").symlink_to("../more")
    (tmp_path / "images" / "again").symlink_to("below")
    files, dropped = Fence.around(tmp_path).files(tmp_path / "images")
    assert [path.name for path in files] == ["a.png", "b.png"]
    reasons = {Path(entry.name).name: entry.reason for entry in dropped}
    assert reasons == {
        "linked": f"is not followed: {tmp_path / 'more'} lies within the data, and counts there or not at all",
        "again": "leads to a folder that is read anyway",
    }


@pytest.mark.parametrize("name", [b"a\nb.png", b"\x1b[2J.png", b"caf\xe9.png", b"x" * 250 + b".png"])
def test_ids_are_text_that_files_can_be_named_by(tmp_path, name):
    good = make_classes(tmp_path)
    written(name, encoded(RGB))(tmp_path)
    splits = Folder.splits(tmp_path, 0.3)
    (made,) = {*splits.train.ids, *splits.val.ids} - good
    assert made.isprintable()
    assert len(made.encode()) <= 200


def test_a_picture_in_two_formats_is_on_one_side(tmp_path):
    make_classes(tmp_path)
    for place in range(20):
        for ending in ("jpg", "tif"):
            save_image(tmp_path / "ant" / f"pair{place}.{ending}", scene(place, [1])[0])
    splits = Folder.splits(tmp_path, 0.4)
    for ids in (splits.train.ids, splits.val.ids):
        pairs = [Path(name).stem for name in ids if "pair" in name]
        assert pairs
        assert sorted(pairs) == sorted(2 * list(set(pairs)))


def test_a_picture_in_two_formats_and_nothing_else(tmp_path):
    for ending in ("jpg", "tif"):
        save_image(tmp_path / "ant" / f"x.{ending}", scene(0, [1])[0])
    splits = Folder.splits(tmp_path, 0.4)
    assert (len(splits.train), len(splits.val)) == (1, 1)


# Tables, and the masks beside them


ROWS = "".join(f"{place}.png,{('ant', 'bee')[place % 2]}\n" for place in range(8))


def table(content: str | bytes, name: str = "tags.csv") -> Callable[[Path], None]:
    def make(root):
        (root / "tags.csv").unlink()
        content_bytes = content if isinstance(content, bytes) else content.encode()
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content_bytes)

    return make


def rows(more: str) -> Callable[[Path], None]:
    return table(f"image,tags\n{ROWS}{more}")


def tagged(more: str) -> Callable[[Path], None]:
    """A tags.json with `more` in it, beside what is true."""
    true = ", ".join(f'"{place}.png": ["{("ant", "bee")[place % 2]}"]' for place in range(8))
    return table(f"{{{true}, {more}}}", "tags.json")


def annotated(xml: str) -> Callable[[Path], None]:
    def make(root):
        (root / "tags.csv").unlink()
        (root / "Annotations").mkdir()
        for place in range(8):
            content = f"<annotation><object><name>{('ant', 'bee')[place % 2]}</name></object></annotation>"
            (root / "Annotations" / f"{place}.xml").write_text(xml if place == 3 else content)

    return make


def piped(name: str) -> Callable[[Path], None]:
    def make(root):
        annotated("<annotation/>")(root)
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)

    return make


NUMBER = "9" * 5000

TABLES = {
    "an unknown tag": Case(rows("8.png,ant\n3.png,beee\n"), refused="'beee', which is not in .*did you mean 'bee'"),
    "a tag twice": Case(table("image,tags\n" + ROWS.replace("0.png,ant", "0.png,ant|ant| ant "))),
    "a row twice": Case(rows("0.png,ant\n")),
    "no tag": Case(table("image,tags\n" + ROWS.replace("0.png,ant", "0.png,"))),
    "a row without an image": Case(rows("gone.png,ant\n"), left=(("row", "gone.png", ""),)),
    "out by ..": Case(rows("../../secret.png,ant\n"), refused=r"line 10: '../../secret.png' leaves images/"),
    "out by backslashes": Case(rows("x\\..\\..\\secret.png,ant\n"), refused="line 10: .* leaves images/"),
    "out by /": Case(rows("/etc/passwd,ant\n"), refused="line 10: '/etc/passwd' leaves images/"),
    "a drive": Case(rows("C:\\x.png,ant\n"), left=(("row", "x.png", ""),)),
    "Latin letters": Case(table("image,tags\n0.png,café\n".encode("cp1252")), refused="tags.csv is not text in UTF-8"),
    "UTF-16": Case(table(f"image,tags\n{ROWS}".encode("utf-16")), refused="tags.csv is not text in UTF-8"),
    "UTF-16 without mark": Case(table(f"image,tags\n{ROWS}".encode("utf-16-le")), refused="has a NUL in line 1"),
    "UTF-8 with mark": Case(table(f"image,tags\n{ROWS}".encode("utf-8-sig"))),
    "a NUL": Case(rows("8\0.png,ant\n"), refused="tags.csv is not text: it has a NUL in line 10"),
    "a million cells": Case(rows(f"8.png{',ant' * 10**6}\n"), refused="line 10 has more columns than the header"),
    "100,000 columns": Case(table(f"image{',a' * 10**5}\n0.png{',1' * 10**5}\n"), refused="several columns 'a'"),
    "a giant cell": Case(rows(f"8.png,{'x' * 10**6}\n"), refused="line 10: field larger than field limit"),
    "a giant header": Case(table("x" * 10**5), refused="must have the header image,tags; its first line is 'xx"),
    "a quote without end": Case(rows('8.png,"ant\n'), refused="line 10: a quote has no end"),
    "a tower of accents": Case(rows(f"8.png,a{chr(0x300) + chr(0x316) * 60_000}\n"), refused="60002 characters"),
    "deep JSON": Case(tagged(f'"8.png": {"[" * DEEP}{"]" * DEEP}'), refused="tags.json is not JSON: .*recursion"),
    "nested JSON": Case(tagged(f'"8.png": {"[" * 500}{"]" * 500}'), left=(("row", "8.png", ""),)),
    "a key twice": Case(tagged('"3.png": ["ant"]'), refused="tags.json is not JSON: the key '3.png' comes twice"),
    "NaN": Case(tagged('"8.png": NaN'), refused="'8.png': expected the names of its classes, got nan"),
    "Infinity": Case(tagged('"8.png": 1e999'), refused="'8.png': expected the names of its classes, got inf"),
    "a giant number": Case(tagged(f'"8.png": {NUMBER}'), refused="tags.json is not JSON: Exceeds the limit"),
    "half a letter": Case(tagged('"3.png/": ["\\ud800"]'), refused=r"'\\\\ud800', which is not in"),
    "a name of NUL": Case(tagged('"\\u0000": ["ant"]'), refused="names no image"),
    "out by JSON": Case(tagged('"../x.png": ["ant"]'), refused="'../x.png' leaves images/"),
    "out by COCO": Case(
        table(
            json.dumps({"images": [{"id": 1, "file_name": "../x.png"}], "annotations": [], "categories": []}), "c.json"
        ),
        refused="image 1: '../x.png' leaves images/",
    ),
    "a billion laughs": Case(annotated(LAUGHS), refused="cannot read the annotation .*3.xml: EntitiesForbidden"),
    "a file as entity": Case(
        annotated('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>'),
        refused="cannot read the annotation .*3.xml: EntitiesForbidden",
    ),
    "an unknown alphabet": Case(
        annotated("<?xml version='1.0' encoding='klingon'?><annotation/>"), refused="3.xml: LookupError"
    ),
    "another image's name": Case(
        annotated("<annotation><filename>../../x.png</filename><object><name>ant</name></object></annotation>")
    ),
    "XML without end": Case(annotated("<a>" * DEEP), refused="cannot read the annotation .*3.xml: ParseError"),
    "deep XML": Case(annotated("<a>" * DEEP + "</a>" * DEEP)),
    "an annotation is a pipe": Case(piped("Annotations/3.xml"), refused="3.xml is no file"),
    "a JSON is a pipe": Case(piped("x.json")),
    "a table outside": Case(
        lambda root: [(root / "tags.csv").unlink(), linked("tags.csv", "/etc/hostname")(root)],
        refused="tags.csv leads out of",
    ),
    "classes twice": Case(
        lambda root: (root / "classes.txt").write_text("ant\nbee\nant\n"), refused="'ant' more than once"
    ),
    "classes in UTF-16": Case(
        lambda root: (root / "classes.txt").write_bytes("ant\nbee".encode("utf-16")),
        refused="classes.txt is not text in UTF-8",
    ),
    "a class of 10,000 letters": Case(
        lambda root: (root / "classes.txt").write_text("ant\nbee\n" + "x" * 10**4), refused="10000 characters"
    ),
}
MASK = Image.fromarray(np.zeros((40, 56), np.uint8))
MASKS = {
    "another size": Case(masked(MASK.resize((9, 9))), left=(("mask", "3.png", "9×9 pixels, its image 56×40"),)),
    "colours": Case(masked(MASK.convert("RGB")), left=(("mask", "3.png", "this has RGB"),)),
    "broken": Case(masked(b"no mask"), left=(("mask", "3.png", "cannot identify"),)),
    "3.6 gigapixels": Case(masked(png(60_000, 60_000)), left=(("mask", "3.png", "exceeds limit"),)),
    "a value that is no class": Case(
        masked(MASK.point(lambda _: 7)), refused="3.png has the value 7, but there are 2 classes"
    ),
    "16-bit values": Case(
        masked(Image.fromarray(np.full((40, 56), 999, np.uint16))), left=(("mask", "3.png", "up to 255"),)
    ),
    "another format": Case(masked(encoded(MASK, "BMP"), "3.bmp"), left=(("mask", "3.bmp", "masks are PNG files"),)),
    "a note": Case(masked(b"who drew them", "notes.txt")),
    "of no image": Case(masked(MASK, "gone.png"), left=(("stray", "gone.png", ""),)),
    "a pipe": Case(
        lambda root: [(root / "masks/3.png").unlink(), os.mkfifo(root / "masks" / "3.png")],
        left=(("mask", "3.png", "no file"),),
    ),
    "outside": Case(
        lambda root: [(root / "masks/3.png").unlink(), linked("masks/3.png", SECRET)(root)],
        left=(("mask", "3.png", "leads out of"),),
    ),
    "all outside": Case(
        lambda root: [(root / "masks").rename(root.parent / "m"), (root / "masks").symlink_to("../m")],
        refused="masks leads out of",
    ),
    "images outside": Case(
        lambda root: [(root / "images").rename(root.parent / "i"), (root / "images").symlink_to("../i")],
        refused="images leads out of",
    ),
}


@pytest.mark.parametrize("case", [*TABLES.values(), *MASKS.values()], ids=[*TABLES, *MASKS])
def test_tables_and_masks(tmp_path, case):
    check(case, tmp_path / "data", make_tagged(tmp_path / "data"))


def test_lists_in_lists_end_in_a_sentence_at_any_depth(tmp_path):
    """Where the parser just manages, what follows may not."""
    for depth in range(800, 1000, 4):
        (tmp_path / "tags.json").write_text(f'{{"a": {"[" * depth}{"]" * depth}}}')
        with contextlib.suppress(ValueError):
            assert read_table(tmp_path / "tags.json")


# What the system does not let us read


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    good = make_classes(tmp_path)
    (tmp_path / "ant" / "closed").mkdir()
    close(monkeypatch, tmp_path / "ant" / "closed")
    contents = read_folder(tmp_path, 0.3)
    assert {photo.id for photo in (*contents.train, *contents.val)} == good
    assert [(entry.kind, Path(entry.name).name, entry.reason) for entry in contents.dropped] == [
        ("closed", "closed", "Permission denied")
    ]
    close(monkeypatch, tmp_path / "bee")
    with pytest.raises(ValueError, match=r"bee cannot be opened: its name may be a class"):
        read_folder(tmp_path, 0.3)


def close(monkeypatch, folder):
    """As chmod 0 for those who are not root."""
    listdir = os.listdir

    def refusing(path="."):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)


@AS_ROOT
def test_files_that_may_not_be_read(tmp_path):
    good = make_classes(tmp_path)
    written("x.png", encoded(RGB))(tmp_path)
    (tmp_path / "ant" / "x.png").chmod(0)
    contents = read_folder(tmp_path, 0.3)
    assert {photo.id for photo in (*contents.train, *contents.val)} == good
    assert "Permission denied" in contents.dropped[0].reason


def test_a_key_that_comes_twice_among_many_is_soon_found():
    text = "{" + ",".join(f'"{name}": 1' for name in (*range(20_000), 19_999)) + "}"
    before = time.process_time()
    with pytest.raises(ValueError, match="'19999' comes twice"):
        parse_json(text, "tags.json")
    assert time.process_time() - before < 1


# New images


def test_prediction_passes_over_what_training_leaves_out(tmp_path, caplog):
    network = SegmentationNetwork(NetworkSpec("tiny", None, "linear", 3))
    predictor = Predictor(network, classes=("ant", "bee"), palette=voc_palette(3), device="cpu")
    root = tmp_path / "data"
    (root / "ant").mkdir(parents=True)
    cases = {name.replace(" ", "-"): case for name, case in IMAGES.items() if name != "100 megapixels"}
    for name, case in cases.items():
        case.make(root)
        (made,) = (path for path in (root / "ant").iterdir() if path.stem == "x")
        made.rename(made.with_stem(name))
    os.mkfifo(root / "ant" / "pipe.jpg")
    before = state_of(root)
    with time_limit():
        outcome = predict_files(predictor, find_images([root], out=tmp_path / "out"), tmp_path / "out")
    assert {path.stem for path in outcome.failed} == {
        name for name, case in cases.items() if case.left and "name" not in name
    }
    assert outcome.predicted == sum(bool(case.used) for case in cases.values())
    assert len(caplog.records) == len(outcome.failed)
    assert state_of(root) == before
