"""Checks of class names that every data set shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

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
        raise ValueError(f"{source} names {twice[0]!r} more than once")
    return tuple(classes)


def tag_matrix(tags: Sequence[Iterable[int]], num_classes: int) -> np.ndarray:
    """bool [len(tags), num_classes] from the class indices of every image."""
    matrix = np.zeros((len(tags), num_classes), bool)
    for row, indices in zip(matrix, tags, strict=True):
        row[list(indices)] = True
    return matrix
