"""Checks of class names that every data set shares."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from mcic.untrusted import shown

MAX_CLASSES = 254
"""mask values are 8 bit; 0 is background and 255 is ignore"""


def check_classes(classes: Sequence[str], *, source: object) -> tuple[str, ...]:
    """`classes` as a tuple; raises ValueError, naming `source`, where a mask could not tell them apart."""
    if not classes:
        raise ValueError(f"{source} names no class: at least one is needed")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{source} names {len(classes)} classes: an 8-bit mask holds at most {MAX_CLASSES}")
    if "background" in classes:
        raise ValueError(f"{source} names a class 'background', which every image has by itself: leave the tags of "
                         "images without an object empty")  # fmt: skip
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ValueError(f"{source} names {shown(twice[0])!r} more than once")
    if odd := [name for name in classes if not is_text(name)]:
        raise ValueError(f"{source} names the class {shown(odd[0])}, which no UTF-8 file can hold as it is: rename it")
    return tuple(classes)


def is_text(name: str) -> bool:
    """Whether a name is UTF-8 without control characters; bytes of a file name that are none are surrogates."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def tag_matrix(tags: Sequence[Iterable[int]], num_classes: int) -> np.ndarray:
    """bool [len(tags), num_classes] from the class indices of every image."""
    matrix = np.zeros((len(tags), num_classes), bool)
    for row, indices in zip(matrix, tags, strict=True):
        row[list(indices)] = True
    return matrix
