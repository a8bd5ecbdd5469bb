"""Colours of mask values."""

from __future__ import annotations

import numpy as np


def voc_palette(count: int) -> np.ndarray:
    """The first `count` colours of PASCAL VOC's colour map: uint8 [count, 3], black first.

    A value's bits are dealt out to the high bits of red, green and blue in turn, so that neighbours differ much.
    """
    values = np.arange(count)
    palette = np.zeros((count, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = (values >> (3 * level + channel)) & 1
            palette[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return palette
