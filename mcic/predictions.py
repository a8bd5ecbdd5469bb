"""Masks for files: a folder with a mask and a picture for every image, and one table of class areas.

    labels/<name>.png       the mask as an index PNG
    overlays/<name>.jpg     the image with colours, outlines and legend
    confidence/<name>.png   8-bit grey, 255 times the probability of the mask's class; on request
    areas.csv               a row for every image and class that occurs
    predictions.json        the network and the settings that all of them were made with

`areas.csv` also is the memory of which image has which name, and of what its mask was made with (`made_with`, a digest
of network, settings and tags). An image's old mask goes first, then its rows come, and its mask comes last: a mask in
`labels/` whose image is in the table is complete and what the rows say.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from mcic import __version__
from mcic.data.images import readable_suffixes
from mcic.data.tags import key_of, read_table
from mcic.durable import write_text
from mcic.predict import Predictor
from mcic.segmentation import Segmentation, save_image

log = logging.getLogger(__name__)

LABELS, OVERLAYS, CONFIDENCE = "labels", "overlays", "confidence"
_FILES = {LABELS: ".png", OVERLAYS: ".jpg", CONFIDENCE: ".png"}
_COLUMNS = ("image", "name", "width", "height", "class", "pixels", "percent", "mean_confidence",
            "made_with")  # fmt: skip
_PROGRESS_INTERVAL = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to predict: its file, absolute, and the name that it should have, which may hold folders."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the images: how many were predicted, how many had been before, and which could not be."""

    predicted: int
    kept: int
    failed: tuple[Path, ...]


def find_images(sources: Iterable[str | Path], *, out: Path) -> list[ImageFile]:
    """The images that files, folders and patterns such as `photos/**/*.jpg` stand for, each once.

    Of a folder all files with the ending of an image format are taken, also in sub-folders, whose names stay in the
    images' names; but hidden ones, and what an earlier prediction wrote below `out`.

    Raises:
        ValueError: a source is no file, and no image is found in it.
    """
    written = [(out / folder).resolve() for folder in _FILES]
    found: dict[Path, ImageFile] = {}
    for source in map(str, sources):
        if Path(source).is_file():
            files = [ImageFile(_absolute(source), Path(source).stem)]
        else:
            files = [file for file in _matches(source) if not any(f in file.path.resolve().parents for f in written)]
        if not files:
            raise ValueError(f"there is no image at {source}: expected a file, a folder with images, or a pattern")
        for file in files:
            found.setdefault(file.path, file)
    return list(found.values())


def _matches(source: str) -> Iterator[ImageFile]:
    """The images in a folder, or in all that a pattern stands for."""
    for path in map(Path, [source] if Path(source).is_dir() else sorted(glob.glob(source, recursive=True))):
        if path.is_dir():
            for file in _images_below(path):
                yield ImageFile(_absolute(file), file.relative_to(path).with_suffix("").as_posix())
        else:
            yield ImageFile(_absolute(path), path.stem)


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in readable_suffixes() and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )  # fmt: skip


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def tags_of_images(table: Path, images: Sequence[ImageFile]) -> dict[Path, frozenset[str]]:
    """The tags of every image from a table in one of the forms of `mcic.data.tags`.

    A row names an image by the end of its path, with or without the ending: `sub/x.jpg`, `x.jpg` or `x`.

    Raises:
        ValueError: the table cannot be read, or has no row for an image.
    """
    if table.suffix not in (".csv", ".tsv", ".json", ".jsonl") or not table.is_file():
        raise ValueError(f"{table} is no table of tags: expected a .csv, .tsv, .json or .jsonl file")
    rows: dict[str, frozenset[str]] = {}
    for row in read_table(table):
        rows[row.image] = rows.get(row.image, frozenset()) | row.tags
    tags = {image.path: next((rows[key] for key in _keys(image.path) if key in rows), None) for image in images}
    missing = [path for path, found in tags.items() if found is None]
    if missing:
        raise ValueError(f"{table} has no row for {len(missing)} of {len(images)} images, such as {missing[0].name}")
    return tags


def predict_files(
    predictor: Predictor, images: Sequence[ImageFile], out: Path, *,
    tags: dict[Path, frozenset[str]] | Sequence[str] | None = None, overlays: bool = True, confidence: bool = False,
    overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Predict images into a folder.

    Images that have a mask there, made with the same tags, are passed over, so that a call can be repeated after an
    interruption. Nothing is written over but what an earlier call wrote for the same image: where another file has the
    name, the new one becomes `<name>-2`. An image that cannot be read is named in a warning and passed over; what was
    written for it earlier stays.

    Args:
        images: of `find_images`.
        out: made if need be.
        tags: the classes that may occur: by the path of the image, or for all of them; None: all classes.
        overlays, confidence: whether to write these, too.
        overwrite: predict images again that have a mask; of another network or settings, masks of other images go.

    Raises:
        ValueError: `out` is a file, or holds masks of another network or other settings, or another program's
            areas.csv.
        OSError: a file cannot be written.
    """
    for names in [tags] if not isinstance(tags, dict) else set(tags.values()):
        predictor.allowed(names)  # a wrong name is no fault of an image
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    table = _Table(out / "areas.csv")
    settings = _settings(predictor, tags)
    if _differs(out, settings, overwrite=overwrite):
        _forget_others(images, table, out)
    names = _names(images, table, out)
    digests = {image.path: _digest(settings, tags[image.path] if isinstance(tags, dict) else ()) for image in images}
    done = {
        image.path for image in images
        if not overwrite and table.digest(image.path) == digests[image.path]
        and _file(out, LABELS, names[image.path]).is_file()
    }  # fmt: skip
    table.rewrite()
    predicted, failed = 0, []
    started = reported = time.monotonic()
    for number, image in enumerate(images):
        if image.path in done:
            continue
        if time.monotonic() - reported > _PROGRESS_INTERVAL:
            reported = time.monotonic()
            log.info("%d of %d images, %.0f s", number, len(images), reported - started)
        try:
            _check_utf8(image.path)
            result = predictor.predict(image.path, tags=tags[image.path] if isinstance(tags, dict) else tags)
        except (ValueError, MemoryError) as error:
            _warn(image.path, error)
            failed.append(image.path)
            continue
        if not predicted:  # not earlier: where no image can be read, nothing is written
            _store_settings(out, settings)
        predicted += 1
        _write(result, image, names[image.path], out, table, made_with=digests[image.path], overlays=overlays,
               confidence=confidence)  # fmt: skip
    table.rewrite()
    return Outcome(predicted, len(done), tuple(failed))


def _warn(path: Path, error: ValueError | MemoryError) -> None:
    shown = os.fsencode(path).decode("utf-8", "replace")
    reason = str(error) if isinstance(error, ValueError) else "no memory for it"
    log.warning("passed over: %s", reason if shown in reason else f"{shown}: {reason}")


def _check_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8, as areas.csv is: rename it") from None


class _Table:
    """`areas.csv`: the rows of every image, in the order in which they came; an image's pixels add up to its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {}
        left: dict[str, int] = {}
        for row in self._read():
            if not left.get(row["image"]):  # the first row of an image, or of one that was predicted again
                self.rows.pop(row["image"], None)
                left[row["image"]] = row["width"] * row["height"]
            self.rows.setdefault(row["image"], []).append(row)
            left[row["image"]] -= row["pixels"]
        self.rows = {image: rows for image, rows in self.rows.items() if left[image] == 0}

    def _read(self) -> Iterator[dict[str, Any]]:
        """The rows of the file but one that an interruption tore."""
        if not self.path.is_file():
            return
        try:
            text, head = self.path.read_text(encoding="utf-8"), _csv_text([], header=True)
            if not text.startswith(head) and not head.startswith(text):
                raise ValueError("other columns")
            for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
                yield {**row, **{name: int(row[name]) for name in ("width", "height", "pixels")}}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{self.path} is not of mcic predict: choose another folder for --out") from error

    def digest(self, image: Path) -> str | None:
        """What an image's mask was made with, see `_digest`."""
        rows = self.rows.get(str(image))
        return rows[0]["made_with"] if rows else None

    def keep(self, images: Sequence[ImageFile]) -> list[str]:
        """Forget all images but these; returns the names of the others."""
        kept = {str(image.path) for image in images}
        forgotten = [rows[0]["name"] for image, rows in self.rows.items() if image not in kept]
        self.rows = {image: rows for image, rows in self.rows.items() if image in kept}
        return forgotten

    def add(self, image: Path, rows: list[dict[str, Any]]) -> None:
        """Put the rows of an image at the end, in the file too."""
        text = _csv_text(rows, header=not self.path.is_file())
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
        self.rows.pop(str(image), None)
        self.rows[str(image)] = rows

    def rewrite(self) -> None:
        """The file without rows that newer ones replaced."""
        if self.rows or self.path.is_file():
            rows = [row for rows in self.rows.values() for row in rows]
            write_text(self.path, _csv_text(rows, header=True))


def _csv_text(rows: list[dict[str, Any]], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(
    result: Segmentation, image: ImageFile, name: str, out: Path, table: _Table, *, made_with: str, overlays: bool,
    confidence: bool,
) -> None:  # fmt: skip
    """Everything of one image, in the place of what was there: its rows first, its mask last."""
    _remove(out, name)
    height, width = result.mask.shape
    table.add(image.path, [
        {"image": str(image.path), "name": name, "width": width, "height": height, "class": area.name,
         "pixels": area.pixels, "percent": f"{area.percent:.4f}", "mean_confidence": f"{area.mean_confidence:.4f}",
         "made_with": made_with}
        for area in result.areas()
    ])  # fmt: skip
    if overlays:
        save_image(Image.fromarray(result.overlay(legend=True)), _file(out, OVERLAYS, name), format="JPEG", quality=90)
    if confidence:
        grey = Image.fromarray(np.rint(result.confidence * 255).astype(np.uint8))
        save_image(grey, _file(out, CONFIDENCE, name), format="PNG")
    result.save(_file(out, LABELS, name))


def _names(images: Sequence[ImageFile], table: _Table, out: Path) -> dict[Path, str]:
    """A name for every image that no other has: what the table says, else its own, else with a number."""
    taken = {rows[0]["name"].casefold() for rows in table.rows.values()}  # some file systems do not tell x from X
    names: dict[Path, str] = {}
    for image in images:
        known = table.rows.get(str(image.path))
        number, name = 1, known[0]["name"] if known else image.name
        while not known and (name.casefold() in taken or any(_file(out, folder, name).exists() for folder in _FILES)):
            number += 1
            name = f"{image.name}-{number}"
        names[image.path] = name
        taken.add(name.casefold())
    return names


def _file(out: Path, folder: str, name: str) -> Path:
    path = out / folder / name
    return path.with_name(path.name + _FILES[folder])


def _remove(out: Path, name: str) -> None:
    """The files of one image, its mask first."""
    for folder in _FILES:
        _file(out, folder, name).unlink(missing_ok=True)


def _settings(predictor: Predictor, tags: dict[Path, frozenset[str]] | Sequence[str] | None) -> dict[str, Any]:
    """What masks of one folder have in common."""
    restricted: Any = "by image" if isinstance(tags, dict) else tags if tags is None else sorted(tags)
    return {
        "network": fingerprint(predictor.network), "protocol": predictor.protocol, "precision": predictor.precision,
        "long_side": predictor.long_side, "tags": restricted,
    }  # fmt: skip


def _digest(settings: dict[str, Any], allowed: Iterable[str]) -> str:
    """What one image's mask is made with, in 12 hexadecimal digits: the settings, and its tags where it has its own."""
    return hashlib.sha256(json.dumps([settings, sorted(allowed)]).encode()).hexdigest()[:12]


def _differs(out: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether what is in the folder was made with other settings; raises ValueError if so, but with `overwrite`."""
    path = out / "predictions.json"
    differing = []
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
            differing = [name for name, value in settings.items() if stored.get(name) != value]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not of mcic predict: choose another folder for --out") from error
    if differing and not overwrite:
        raise ValueError(f"{out} holds masks of another {' and '.join(differing)}: choose another folder for --out, "
                         "or --overwrite")  # fmt: skip
    return bool(differing)


def _forget_others(images: Sequence[ImageFile], table: _Table, out: Path) -> None:
    """Remove what was written for images that are not among these."""
    for name in table.keep(images):
        _remove(out, name)


def _store_settings(out: Path, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"mcic": __version__, "settings": settings}, indent=1, ensure_ascii=False)
    write_text(out / "predictions.json", text)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _keys(path: Path) -> Iterator[str]:
    """How a table may name a file: the longest end of its path first, with its ending and without."""
    parts = PurePosixPath(key_of(path)).parts[1:]
    for place in range(len(parts)):
        end = PurePosixPath(*parts[place:])
        yield from (end.as_posix(), end.with_suffix("").as_posix())
