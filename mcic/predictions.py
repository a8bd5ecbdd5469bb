"""Masks for files: a folder with a mask and a picture for every image, and one table of class areas.

    labels/<name>.png       the mask as an index PNG
    overlays/<name>.jpg     the image with colours, outlines and legend
    confidence/<name>.png   8-bit grey, 255 times the probability of the mask's class; on request
    areas.csv               a row for every image and class that occurs
    predictions.json        the network and the settings that all of them were made with

`areas.csv` also is the memory of which image has which name, and of what its mask was made with (`made_with`, a digest
of network, settings, tags, and size and time of the image's file). An image's old mask goes first, then its rows come,
and its mask comes last: a mask in `labels/` whose image is in the table is complete and what the rows say. Ranks that
torchrun started share the images.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mcic import __version__, distributed
from mcic.areas import AreaTable
from mcic.data.image_names import ImageNames, file_name
from mcic.data.names import is_text
from mcic.data.shards import images_of, names_shards
from mcic.data.tags import is_table, key_of, read_table
from mcic.durable import remove_partials, write_text
from mcic.pictures import readable_suffixes
from mcic.predict import Predictor
from mcic.segmentation import Segmentation, save_image
from mcic.untrusted import printable, read_json

log = logging.getLogger(__name__)

LABELS, OVERLAYS, CONFIDENCE = "labels", "overlays", "confidence"
SETTINGS = "predictions.json"
_FILES = {LABELS: ".png", OVERLAYS: ".jpg", CONFIDENCE: ".png"}
_PROGRESS_INTERVAL = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: its file, absolute; of an image in a tar, the tar's (or its command or URL) with the name in it behind.
        name: that it should have, which may hold folders.
        read: gives the image where it is no file of its own: uint8 [H, W, 3]; raises ValueError if it cannot be read.
    """

    path: Path
    name: str
    read: Callable[[], np.ndarray] | None = None

    def content(self) -> Path | np.ndarray:
        """What a `Predictor` takes."""
        return self.path if self.read is None else self.read()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the images, over all ranks: how many were predicted, how many had been before, and which could not
    be."""

    predicted: int
    kept: int
    failed: tuple[Path, ...]


def find_images(sources: Iterable[str | Path], *, out: Path) -> list[ImageFile]:
    """The images that files, folders, patterns such as `photos/**/*.jpg` and tars of samples stand for, each once.

    Tars are files, patterns that end with .tar, commands and URLs, see `mcic.data.shards`. Of a folder all files with
    the ending of an image format are taken, also in sub-folders, whose names stay in the images' names; but hidden
    ones, and what an earlier prediction wrote there or below `out`. Links to folders are not followed.

    Raises:
        ValueError: a source is no file, and no image is found in it.
    """
    written = [(out / folder).resolve() for folder in _FILES]
    found: dict[Path, ImageFile] = {}
    for source in map(str, sources):
        if names_shards(source) and not Path(source).is_dir():
            files = [ImageFile(Path(path), name, read) for path, name, read in images_of(source)]
        elif Path(source).is_file():
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
    """In the order of their paths. What predictions wrote anywhere in the folder are no photographs."""
    written = {path.parent / name for path in folder.rglob(SETTINGS) if _is_ours(path) for name in _FILES}
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in readable_suffixes() and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and written.isdisjoint(path.parents)
    )  # fmt: skip


def _is_ours(path: Path) -> bool:
    """Whether a file called as our settings are holds them."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"mcic", "settings"}


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def tags_of_images(table: Path, images: Sequence[ImageFile]) -> dict[Path, frozenset[str]]:
    """The tags of every image from a table in one of the forms of `mcic.data.tags`.

    A row names an image by the end of its path, with or without the ending: `sub/x.jpg`, `x.jpg` or `x`; where no
    row does, by the rules with which training reads tables: case and the image's ending play no part. A row that is the
    end of several paths is of all of them.

    Raises:
        ValueError: the table cannot be read, has no row for an image, or one that by the looser rules may mean several.
    """
    if not is_table(table) or not table.is_file():
        raise ValueError(f"{table} is no table of tags: expected a .csv, .tsv, .json or .jsonl file")
    rows: dict[str, frozenset[str]] = {}
    listed = read_table(table)
    for row in listed:
        rows[row.image] = rows.get(row.image, frozenset()) | row.tags
    exact = {image.path: next((key for key in _keys(image.path) if key in rows), None) for image in images}
    tags = {path: None if key is None else rows[key] for path, key in exact.items()}
    paths = {_key(image.path): image.path for image in images}
    certain = set(exact.values())
    names = ImageNames(paths, named=(key for key, path in paths.items() if exact[path] is not None))
    for row in listed:
        if row.image not in certain and (key := names.find(row)) is not None:
            tags[paths[key]] = (tags[paths[key]] or frozenset()) | row.tags
    missing = [path for path, found in tags.items() if found is None]
    if missing:
        raise ValueError(f"{table} has no row for {len(missing)} of {len(images)} images, such as {missing[0].name}")
    return tags


def predict_files(
    predictor: Predictor, images: Sequence[ImageFile], out: Path, *,
    tags: dict[Path, frozenset[str]] | Sequence[str] | None = None, overlays: bool = True, confidence: bool = False,
    overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Predict images into a folder; the ranks of a process group, if there is one, share them.

    Images that have a mask there and what else is wanted, made from the same file (of an image in a tar: of the same
    name) with the same tags, are passed over, so that a call can be repeated after an interruption. Nothing is written
    over but what an earlier call wrote for the same image: where another file has the name, the new one becomes
    `<name>-2`. An image that cannot be read is named in a warning and passed over; what was written for it earlier
    stays.

    Args:
        images: of `find_images`.
        out: made if need be.
        tags: the classes that may occur: by the path of the image, or for all of them; None: all classes.
        overlays, confidence: whether to write these, too.
        overwrite: predict images again that have a mask; of another network or settings, masks of other images go.

    Raises:
        ValueError: `out` is a file, or holds masks of another network or other settings, or another program's
            areas.csv; or the ranks were given different images.
        OSError: a file cannot be written.
    """
    for names in [tags] if not isinstance(tags, dict) else set(tags.values()):
        predictor.allowed(names)  # a wrong name is no fault of an image
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    _require_agreement(images, predictor.device)
    settings = _settings(predictor, tags)
    order = [image.path for image in images]
    table = _claimed_table(out, settings, order, overwrite=overwrite)
    names = _names(images, table, out)
    digests = _digests(settings, images, tags)
    wanted = [LABELS, *[OVERLAYS] * overlays, *[CONFIDENCE] * confidence]
    done = {
        image.path for image in images
        if not overwrite and table.digest(image.path) == digests[image.path]
        and all(_file(out, folder, names[image.path]).is_file() for folder in wanted)
    }  # fmt: skip
    left = [place for place, image in enumerate(images) if image.path not in done]
    share = left[distributed.rank() :: distributed.world_size()]
    leads, before = distributed.rank() == 0 and bool(left), _stored_settings(out)
    distributed.barrier()  # every rank knows what is there before the first one adds to it
    if leads:
        _store_settings(out, _settings_text(settings))
    distributed.barrier()  # no mask comes before them
    fate = torch.zeros(2, len(images), dtype=torch.int32)  # predicted, failed
    for place in _with_progress(share):
        image = images[place]
        result = _predicted(predictor, image, tags[image.path] if isinstance(tags, dict) else tags)
        fate[int(result is None), place] = 1
        if result is not None:
            _write(result, image, names[image.path], out, table, made_with=digests[image.path], overlays=overlays,
                   confidence=confidence)  # fmt: skip
    predicted, failed = distributed.sum_(fate.to(predictor.device)).cpu()
    if distributed.rank() == 0:
        table.take_over(order)
    if leads and not predicted.any():
        _store_settings(out, before)
    distributed.barrier()
    unread = tuple(image.path for image, is_failed in zip(images, failed.tolist(), strict=True) if is_failed)
    return Outcome(int(predicted.sum()), len(done), unread)


def _predicted(predictor: Predictor, image: ImageFile, tags: Iterable[str] | None) -> Segmentation | None:
    """None where that is not possible, which a warning says."""
    try:
        _require_plain(image.path)
        return predictor.predict(image.content(), tags=tags)
    except (ValueError, MemoryError) as error:
        _warn(image.path, error)
        return None


def _with_progress(places: Sequence[int]) -> Iterator[int]:
    """The places, saying now and then how far this is."""
    started = reported = time.monotonic()
    for number, place in enumerate(places):
        if time.monotonic() - reported > _PROGRESS_INTERVAL:
            reported = time.monotonic()
            log.info("%d of %d images, %.0f s", number, len(places), reported - started)
        yield place


def _claimed_table(out: Path, settings: dict[str, Any], order: Sequence[Path], *, overwrite: bool) -> AreaTable:
    """The table of what is in the folder, the same on every rank, without what other settings made."""
    differs = _differs(out, settings, overwrite=overwrite)
    distributed.barrier()  # every rank has looked before the first one writes
    if distributed.rank() == 0:
        for folder in _FILES:
            remove_partials(out / folder)
        table = AreaTable(out)
        table.take_over(order)
        if differs:
            for name in table.keep(order):
                _remove(out, name)
            table.take_over(order)
    distributed.barrier()
    return AreaTable(out, rank=distributed.rank())


def _warn(path: Path, error: ValueError | MemoryError) -> None:
    shown = printable(os.fsencode(path).decode("utf-8", "replace"))
    reason = str(error) if isinstance(error, ValueError) else "no memory for it"
    log.warning("passed over: %s", reason if shown in reason else f"{shown}: {reason}")


def _require_plain(path: Path) -> None:
    if not is_text(str(path)):
        raise ValueError("its name is not UTF-8, or holds a control character, which areas.csv cannot: rename it")


def _require_agreement(images: Sequence[ImageFile], device: torch.device) -> None:
    """Raise ValueError, on every rank, unless all were given the same images."""
    listed = json.dumps([[str(image.path), image.name] for image in images])
    digest = hashlib.sha256(listed.encode()).hexdigest()
    differs = torch.tensor([distributed.from_first(digest) != digest], dtype=torch.int32, device=device)
    if distributed.sum_(differs).item():
        raise ValueError("the ranks found different images: expected the same files at the same paths on all machines, "
                         "and that none comes or goes meanwhile")  # fmt: skip


def _write(
    result: Segmentation, image: ImageFile, name: str, out: Path, table: AreaTable, *, made_with: str, overlays: bool,
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


def _names(images: Sequence[ImageFile], table: AreaTable, out: Path) -> dict[Path, str]:
    """A name for every image that no other has: what the table says, else its own, else with a number."""
    taken = {rows[0]["name"].casefold() for rows in table.rows.values()}  # some file systems do not tell x from X
    names: dict[Path, str] = {}
    for image in images:
        known = table.rows.get(str(image.path))
        *folders, last = image.name.split("/")
        own = "/".join([*folders, file_name(last)])  # short enough for an ending, and more while it is written
        number, name = 1, known[0]["name"] if known else own
        while not known and (name.casefold() in taken or any(_file(out, folder, name).exists() for folder in _FILES)):
            number += 1
            name = f"{own}-{number}"
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


def _digests(
    settings: dict[str, Any], images: Sequence[ImageFile], tags: dict[Path, frozenset[str]] | Sequence[str] | None
) -> dict[Path, str]:
    """What each image's mask is made with, in 12 hexadecimal digits: the settings, its tags where it has its own, and
    size and time of its file; those of rank 0's, for all ranks must pass over the same images."""
    made_with = [
        [settings, sorted(tags[image.path]) if isinstance(tags, dict) else [], _state(image)] for image in images
    ]
    texts = [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:12] for each in made_with]
    return dict(zip((image.path for image in images), distributed.from_first(" ".join(texts)).split(), strict=True))


def _state(image: ImageFile) -> list[int]:
    """Bytes of the image's file and when it was changed, in ns; [] where it has none of its own."""
    try:
        facts = image.path.stat()
    except (OSError, ValueError):
        return []
    return [facts.st_size, facts.st_mtime_ns]


def _differs(out: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether what is in the folder was made with other settings; raises ValueError if so, but with `overwrite`."""
    path = out / SETTINGS
    differing = []
    if path.is_file():
        try:
            stored = read_json(path)["settings"]
            differing = [name for name, value in settings.items() if stored.get(name) != value]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not of mcic predict: choose another folder for --out") from error
    if differing and not overwrite:
        raise ValueError(f"{out} holds masks of another {' and '.join(differing)}: choose another folder for --out, "
                         "or --overwrite")  # fmt: skip
    return bool(differing)


def _stored_settings(out: Path) -> str | None:
    path = out / SETTINGS
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _settings_text(settings: dict[str, Any]) -> str:
    return json.dumps({"mcic": __version__, "settings": settings}, indent=1, ensure_ascii=False)


def _store_settings(out: Path, text: str | None) -> None:
    """Make the folder with them; None: remove them, and the folder if nothing else is in it."""
    if text is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / SETTINGS, text)
        return
    (out / SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):
        out.rmdir()


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(path: Path) -> str:
    """An absolute path without what stands before its first folder."""
    return PurePosixPath(*PurePosixPath(key_of(path)).parts[1:]).as_posix()


def _keys(path: Path) -> Iterator[str]:
    """How a table may name a file: the longest end of its path first, with its ending and without."""
    parts = PurePosixPath(_key(path)).parts
    for place in range(len(parts)):
        end = PurePosixPath(*parts[place:])
        yield from (end.as_posix(), end.with_suffix("").as_posix())
