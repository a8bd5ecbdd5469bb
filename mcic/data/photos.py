"""The photographs of a user's folder: one record each, and the check that a run will be able to read them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mcic.data.base import IGNORE
from mcic.data.dropped import Dropped
from mcic.data.images import ImageFacts, probe_image, read_mask

THREADS = 8
"""how many files are read at a time; Pillow decodes without Python's lock"""


@dataclass(frozen=True, slots=True)
class Photo:
    """One image of a folder.

    Attributes:
        id: `name`, with `__` for `/`.
        name: the path below `images/` or below the class folders' parent, without the ending; Unicode form NFC.
        path: the file.
        tags: names of its classes.
        mask: the file of its mask, or None.
        facts: what the file says of itself, once it was read.
    """

    id: str
    name: str
    path: Path
    tags: frozenset[str]
    mask: Path | None = None
    facts: ImageFacts | None = None


def readable(photos: Sequence[Photo], *, num_classes: int) -> tuple[list[Photo], list[Dropped]]:
    """The photos that can be read, each with its facts, and what was left out: broken images and unusable masks.

    Everything is decoded (JPEGs at low resolution), so that no file can end a run in its middle. A mask is unusable
    if it cannot be read or has another size than its image; the image stays.

    Raises:
        ValueError: a mask holds a value above `num_classes` that is not ignore: then its classes are not those of the
            tags, and no mask can be trusted.
    """
    kept: list[Photo] = []
    dropped: list[Dropped] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for photo, losses in pool.map(lambda photo: _read(photo, num_classes), photos):
            kept += [] if photo is None else [photo]
            dropped += losses
    return kept, dropped


def _read(photo: Photo, num_classes: int) -> tuple[Photo | None, list[Dropped]]:
    try:
        facts = probe_image(photo.path)
    except ValueError as error:
        return None, [Dropped("broken", str(photo.path), _cause(error))]
    photo = replace(photo, facts=facts)
    if photo.mask is None:
        return photo, []
    try:
        mask = read_mask(photo.mask)
    except ValueError as error:
        return replace(photo, mask=None), [Dropped("mask", str(photo.mask), _cause(error))]
    if mask.shape != facts.size:
        reason = f"{_size(mask.shape)} pixels, its image {_size(facts.size)}"
        return replace(photo, mask=None), [Dropped("mask", str(photo.mask), reason)]
    largest = int(mask.max(where=mask != IGNORE, initial=0))
    if largest > num_classes:
        raise ValueError(
            f"the mask {photo.mask} has the value {largest}, but there are {num_classes} classes: expected "
            f"0…{num_classes} or {IGNORE} (ignore); classes.txt says which class has which value"
        )
    return photo, []


def _cause(error: ValueError) -> str:
    """What is wrong, without the file's name in front, which stands beside it."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"
