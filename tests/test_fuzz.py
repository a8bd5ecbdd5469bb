"""Readers of files that people bring: whatever is in them, the outcome is a value or one sentence that names the file.

`make test` gives each reader a few hundred cases, `make test-faults` 100,000 in all.
"""

import contextlib
import copy
import io
import json
import math
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from PIL import Image

from mcic.areas import AreaTable
from mcic.config import Config
from mcic.config_io import load_config, save_config
from mcic.data.coco import COCO14
from mcic.data.folder import read_folder
from mcic.data.images import probe_image, read_image, read_map, read_mask
from mcic.data.tags import read_table
from mcic.data.targets import SavedMasks
from mcic.data.voc import CLASSES, VOC12
from mcic.report import write_report
from mcic.report_comparison import write_comparison

FEW = 150
SECONDS = 10
"""of computing that a reader may take for a file of a few kilobytes"""

TOKENS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\n", b"\r", b'"', b"'", b",", b";", b"\t", b"|", b"../",
    b"/etc/", b"C:\\", b"[", b"]", b"{", b"}", b":", b"[" * 3000, b'{"a":' * 3000, b"<a>" * 3000, b"- " * 3000, b"null",
    b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 30, b"9" * 5000, b"0x" + b"f" * 6000, b'"\\ud800"',
    b'"\\u0000"', b"&a;", b"&#0;", b"<!DOCTYPE a [<!ENTITY a 'b'>]>", b"<![CDATA[",
    b"<?xml version='1.0' encoding='utf-7'?>", b"<object><name>", b"</name></object>", b"&x ", b"*x ", b"!!int ",
    b"!!python/object:os.system ", b"!!timestamp ", b"? ", b"<<: ", b"---\n", b"images", b"annotations", b"categories",
    b"image", b"tags", b"step", b"\xcc\x80\xcc\x96" * 500,
]  # fmt: skip
"""what readers stumble over"""
SCALARS = (
    None, True, False, -3, 0, 1, 2, 255, 10**30, 10**400, -(2**63), 2**53, 0.5, -1e-300, 1e308, math.nan, math.inf, "",
    "1", "cat", "a.png", "../x.png", "/etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 5000,
)  # fmt: skip

COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "height": 4, "width": 6},
        {"id": 2, "file_name": "b.png", "height": 4, "width": 6},
    ],
    "annotations": [
        {"image_id": 1, "category_id": 3, "iscrowd": 0, "area": 4, "segmentation": [[1, 1, 4, 1, 4, 3]]},
        {"image_id": 2, "category_id": 7, "iscrowd": 1, "area": 4.5, "segmentation": {"counts": [20, 4]}},
        {"image_id": 2, "category_id": 7, "area": 2, "segmentation": {"size": [4, 6], "counts": "d04"}},
    ],
    "categories": [{"id": 3, "name": "kite"}, {"id": 7, "name": "boat"}],
}
XML = "<annotation><filename>a.jpg</filename><object><name>cat</name><difficult>1</difficult></object></annotation>"
SUMMARY = {
    "classes": ["background", "cat"], "palette": [[0, 0, 0], [9, 9, 9]], "per_class": {"val": [50.0, None]},
    "confusion": [[5, 1], [0, 7]], "val/miou": 41.5, "seconds": 9.5, "backend": "reference", "protocol": "voc",
}  # fmt: skip
EXAMPLES = [{"id": "a", "tags": ["cat"], "iou": {"prediction": 50.0}, "uncertainty": 3.0, "panels": {"image": "0.png"}}]
READINGS = {
    "sources": [{"class": "cat", "image": "a", "contexts": 2}],
    "thumbnails": {"a": "0.png"},
    "readings": [{"rows": 1, "columns": 1, "sources": [0], "weights": [9]}],
}
AREAS = (
    b"image,name,width,height,class,pixels,percent,mean_confidence,made_with\n"
    b"/a/x.png,x,3,2,cat,4,66.6667,0.9000,0123456789ab\n/a/x.png,x,3,2,dog,2,33.3333,0.8000,0123456789ab\n"
)
METRICS = [{"step": 1, "loss/total": 2.5, "lr": 0.1}, {"step": 2, "loss/total": 2.25, "lr": 0.05}]
MASKS = {"format": 1, "classes": ["background", *CLASSES], "settings": {"split": "train"}, "ground_truth_used": False}


def picture(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 20, (4, 6, 3), np.uint8)).convert(mode)
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return file.getvalue()


PICTURES = [
    picture(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "ICO")
]
PICTURES += [picture(*kind) for kind in (("GIF", "P"), ("PNG", "P"), ("PNG", "LA"), ("JPEG", "CMYK"), ("TIFF", "I;16"))]
MASK_PICTURES = [picture("PNG", "P"), picture("PNG", "L"), picture("TIFF", "I;16")]


def draw_coco(root):
    data = COCO14(root / "coco", "train")
    return [data.mask(index) for index in range(len(data))]


def read_pixels(root):
    for reader in (probe_image, read_image, read_map):
        reader(root / "pixels.bin")


def write_pages(root):
    write_report(root / "run")
    write_comparison([root / "run", root / "other"], out=root / "comparison.html")


@dataclass(frozen=True)
class Reader:
    """A file of a prepared folder and what reads it.

    Attributes:
        path: the file, below the folder.
        valid: contents to start from: bytes, or what JSON holds.
        read: called with the folder.
        lines: whether every entry of what JSON holds is a line.
        many: how many cases `make test-faults` tries.
    """

    path: str
    valid: list[Any]
    read: Callable[[Path], object]
    lines: bool = False
    many: int = 7500


def of_table(name: str, *valid: Any, lines: bool = False) -> Reader:
    return Reader(name, list(valid), lambda root: read_table(root / Path(name).parts[0]), lines)


def of_page(name: str, valid: Any, *, lines: bool = False) -> Reader:
    return Reader(f"run/{name}", [valid], write_pages, lines, many=2000)


READERS = {
    "csv": of_table("tags.csv", b"image,tags\na.png,cat|dog\nb.png,\n", b"image;ant;bee\na.png;0;1\nb.png;1;1\n"),
    "json": of_table(
        "tags.json", {"a.png": ["cat"], "b.png": {"cat": True}}, [{"image": "a.png", "tags": "cat|dog"}], COCO,
        {"images": [{"file_name": "a.png", "label": [{"name": "cat"}]}]},
    ),
    "json lines": of_table(
        "tags.jsonl", [{"file_name": "a.png", "tags": ["cat"]}, {"file_name": "b.png", "tags": "x"}], lines=True
    ),
    "xml": of_table("Annotations/a.xml", XML.encode()),
    "coco": Reader("coco/annotations/instances_train2014.json", [COCO], draw_coco),
    "voc": Reader("voc/Annotations/a.xml", [XML.encode()], lambda root: VOC12(root / "voc", "train")),
    "voc list": Reader("voc/ImageSets/Segmentation/train.txt", [b"a\n"], lambda root: VOC12(root / "voc", "train")),
    "classes": Reader("folder/classes.txt", [b"ant\ncat\ndog\n"], lambda root: read_folder(root / "folder", 0.5)),
    "folder": Reader(
        "folder/tags.csv", [b"image,tags\na.png,cat\nb.png,dog|ant\n"], lambda root: read_folder(root / "folder", 0.5)
    ),
    "areas": Reader("areas/areas.csv", [AREAS], lambda root: AreaTable(root / "areas")),
    "masks": Reader("masks/masks.json", [MASKS], lambda root: SavedMasks(root / "masks", VOC12(root / "voc", "train"))),
    "pixels": Reader("pixels.bin", PICTURES, read_pixels),
    "mask": Reader("mask.bin", MASK_PICTURES, lambda root: read_mask(root / "mask.bin")),
    "config": Reader("config.yaml", [], lambda root: load_config(root / "config.yaml"), many=4000),
    "run's config": of_page("config.yaml", b"preset: shapes\ndata: {name: shapes, root: null}\nrun: {keep: 2}"),
    "summary": of_page("summary.json", SUMMARY),
    "metrics": of_page("metrics.jsonl", METRICS, lines=True),
    "environment": of_page("env.json", {"python": "3.12", "gpus": []}),
    "examples": of_page("previews/final/index.json", EXAMPLES),
    "readings": of_page("previews/final/readings.json", READINGS),
}  # fmt: skip


def prepare(root: Path) -> None:
    """A folder in which every reader is content."""
    for reader in READERS.values():
        write(root / reader.path, encoded(reader.valid[0], reader.lines) if reader.valid else b"")
    save_config(Config(), root / "config.yaml")
    for name in ("a", "b"):
        for folder in ("coco/train2014", "folder/images", "voc/SegmentationClass"):
            write(root / folder / f"{name}.png", picture("PNG", "P"))
        write(root / "voc/JPEGImages" / f"{name}.jpg", picture("JPEG"))
    for file in (
        "masks/labels/a.png",
        "masks/confidence/a.png",
        "run/previews/final/0.png",
        "other/previews/final/0.png",
    ):
        write(root / file, picture("PNG", "L"))
    for file in ("config.yaml", "metrics.jsonl", "previews/final/index.json"):
        write(root / "other" / file, (root / "run" / file).read_bytes())


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encoded(value: Any, lines: bool) -> bytes:
    if isinstance(value, bytes):
        return value
    return b"".join(json.dumps(row).encode() + b"\n" for row in value) if lines else json.dumps(value).encode()


def damaged(random: Random, reader: Reader, valid: list[Any]) -> bytes:
    """Random bytes now and then; mostly a valid document with values replaced, or with a few bytes changed."""
    if random.random() < 0.03:
        return random.randbytes(random.randint(0, 100))
    document = random.choice(valid)
    if not isinstance(document, bytes) and random.random() < 0.6:
        document = copy.deepcopy(document)
        for _ in range(random.randint(1, 2)):
            if places := [(inner, key) for inner in containers(document) for key in keys_of(inner)]:
                change(random, *random.choice(places))
        return encoded(document, reader.lines)
    content = bytearray(encoded(document, reader.lines))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        place, length = random.randint(0, len(content)), random.choice([0, 0, 0, 1, 1, 1, 2, 2, 8, 10**6])
        new = random.choice(TOKENS) if random.random() < 0.6 else random.randbytes(random.randint(0, 4))
        content[place : place + length] = new
    return bytes(content)


def change(random: Random, container: Any, key: Any) -> None:
    """Another value, none, or the value twice."""
    kind = random.random()
    if kind < 0.7:
        container[key] = any_value(random)
    elif kind < 0.85:
        del container[key]
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))


def any_value(random: Random, depth: int = 2) -> Any:
    """What JSON can hold."""
    kind = random.random() if depth else 0
    if kind < 0.7:
        return random.choice(SCALARS)
    inner = [any_value(random, depth - 1) for _ in range(random.randint(0, 3))]
    return inner if kind < 0.85 else {str(random.choice(SCALARS))[:9]: value for value in inner}


def containers(document):
    """The document and all lists and objects in it."""
    if isinstance(document, list | dict):
        yield document
        for inner in document if isinstance(document, list) else document.values():
            yield from containers(inner)


def keys_of(container):
    return list(container) if isinstance(container, dict) else range(len(container))


class Watch:
    """Sees what is opened while a reader runs, by an audit hook: those stay, so it sleeps in between."""

    KNOWN = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent))

    def __init__(self):
        self.opened: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
            self.opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    @contextlib.contextmanager
    def over(self, root):
        self.opened = opened = []
        try:
            yield
        finally:
            self.opened = None
        assert not [path for path in opened if not path.startswith((*self.KNOWN, str(root)))]


@pytest.fixture(scope="session")
def watch():
    return Watch()


class HangError(BaseException):
    """Nobody catches it on the way."""


def hangs(*_):
    raise HangError(f"more than {SECONDS} s")


def outcome(reader: Reader, root: Path, watch: Watch) -> str:
    """`value` or `sentence`; anything else fails."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watch.over(root), warnings.catch_warnings(action="ignore"):
            reader.read(root)
        return "value"
    except (ValueError, OSError) as error:
        system = isinstance(error, OSError) and error.filename
        sentence = f"{error.filename}: {error.strerror}" if system else str(error)
        if not any(name in sentence for name in (str(root), Path(reader.path).stem)) or len(sentence) > 1000:
            raise AssertionError(f"expected a sentence that names {reader.path}, got {sentence[:300]!r}") from error
        return "sentence"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(name: str, root: Path, watch: Watch, cases: int) -> Counter:
    """How often each outcome came."""
    prepare(root)
    reader, counts = READERS[name], Counter()
    valid = reader.valid or [(root / reader.path).read_bytes()]
    before = signal.signal(signal.SIGPROF, hangs)
    assert outcome(reader, root, watch) == "value"  # else nothing behind the first check would be tried

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))  # a seed: drawing every choice by hypothesis takes ten times as long
    def check(random):
        content = damaged(random, reader, valid)
        note(f"{reader.path}: {content[:2000]!r}")
        (root / reader.path).write_bytes(content)
        counts[outcome(reader, root, watch)] += 1

    try:
        check()
    finally:
        signal.signal(signal.SIGPROF, before)
    return counts


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_files(name, tmp_path, watch):
    counts = fuzz(name, tmp_path, watch, FEW if READERS[name].many > 2000 else FEW // 4)
    assert counts["sentence"]


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_many_files(name, tmp_path, watch):
    counts = fuzz(name, tmp_path, watch, READERS[name].many)
    assert counts["sentence"]
    assert set(counts) <= {"value", "sentence"}
    print(f"\n{name}: {counts.total()} files, {counts['value']} read, {counts['sentence']} refused in a sentence")
