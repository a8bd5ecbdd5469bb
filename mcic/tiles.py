"""Dense scores of an image that is too large for the network at once: overlapping tiles without seams.

A tile sees `CONTEXT` pixels beyond the part it is asked for, and hands over to its neighbour along a ramp of `RAMP`
pixels on which the weights of the two sum to 1. A network that looks no further than `CONTEXT` pixels therefore gives
what it would give for the whole image; of one that looks further, differences fade instead of ending at an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcic.inference import PROTOCOLS, dense_protocol, pad_to_grid

CONTEXT = 192
"""pixels that a tile sees and does not answer for, at every side where the image goes on"""

RAMP = 64
"""pixels on which one tile fades into the next"""

_BAND_VALUES = 2**26

_SCALE_GRID = 4
"""times the stride: tiles begin where the features of all scales of a protocol (quarters) begin"""


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis, in pixels of the image.

    Attributes:
        start, stop: what the network sees.
        begin, end: where its weight is above 0; the first `RAMP` pixels are shared with the tile before, the last
            with the one behind.
        fade: where the tile behind begins; `end` for the last tile.
    """

    start: int
    stop: int
    begin: int
    end: int
    fade: int

    def weights(self, device: torch.device) -> Tensor:
        """f32 [end - begin]: rising to 1 along the first ramp, falling to 0 along the last."""
        weights = torch.ones(self.end - self.begin, device=device)
        rising = (torch.arange(RAMP, device=device) + 0.5) / RAMP
        if self.begin > 0:
            weights[:RAMP] = rising
        if self.fade < self.end:
            weights[self.fade - self.begin :] = rising.flip(0)
        return weights


def spans(length: int, *, limit: int, unit: int) -> list[Span]:
    """Cut an axis into tiles of nearly the same size.

    Args:
        length: of the axis, pixels.
        limit: the most pixels that the network may see at once; raised to the least with which tiles can overlap.
        unit: tiles begin at its multiples, and all but the last end one pixel behind one.
    """
    shared = _ceil(2 * CONTEXT + RAMP, unit) * unit
    largest = max((limit - 1) // unit * unit, 2 * shared)
    if length <= max(limit, largest + 1):
        return [Span(0, length, 0, length, length)]
    units = _ceil(length - 1, unit)  # of the axis, padded to its grid
    count = _ceil(units * unit - shared, largest - shared)
    side = _ceil(units * unit + (count - 1) * shared, count * unit)  # units of a tile
    starts = [place * (units - side) // max(1, count - 1) * unit for place in range(count)]
    stops = [min(start + side * unit + 1, length) for start in starts]
    fades = [(start + stop - RAMP) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    return [
        Span(start, stop, begin, end, fade)
        for start, stop, begin, end, fade in zip(
            starts, stops, [0, *fades], [*(fade + RAMP for fade in fades), length], [*fades, length], strict=True
        )
    ]


def tiled_protocol(
    function: Callable[[Tensor], Tensor], image: Tensor, stride: int, protocol: str, *, limit: int,
    prepare: Callable[[Tensor], Tensor],
) -> Iterator[tuple[slice, slice, Tensor]]:  # fmt: skip
    """`dense_protocol` of one image of any size, part by part: the parts cover the image once.

    Beside the network's own memory it takes that of one tile's scores and of one ramp along the whole width.

    Args:
        function: images f32 [1, 3, h, w] → scores [1, C, h', w'] on the feature grid.
        image: [3, H, W] of any type and on any device.
        stride: image pixels per feature pixel.
        protocol: of `mcic.inference.PROTOCOLS`. With several scales a tile's side is scaled by exactly 3/4 and 5/4,
            the whole image's only nearly: beside the ramps the scores can differ a little from the untiled ones.
        limit: largest side of a tile, pixels.
        prepare: a piece of `image`, [3, h, w] → what the network takes, f32 [1, 3, h, w].

    Yields:
        rows, columns, scores f32 [C, len(rows), len(columns)] on the device of `prepare`'s result.
    """
    unit = stride if len(PROTOCOLS[protocol][0]) == 1 else _SCALE_GRID * stride
    height, width = image.shape[-2:]
    columns = spans(width, limit=limit, unit=unit)
    above: Tensor | None = None  # [C, RAMP, W]: what the row of tiles before leaves on the ramp
    for row in spans(height, limit=limit, unit=unit):
        below: list[Tensor] = []
        left: Tensor | None = None  # [C, rows, RAMP]: what the tile before leaves
        for column in columns:
            piece = pad_to_grid(prepare(image[:, row.start : row.stop, column.start : column.stop]), unit)
            scores = _weighted(dense_protocol(function, piece, stride, protocol)[0], row, column)
            if left is not None:
                scores[..., :RAMP] += left
            settled = column.fade - column.begin
            left = scores[..., settled:].clone()
            scores = scores[..., :settled]  # nothing will be added in these columns
            if above is not None:
                scores[:, :RAMP] += above[..., column.begin : column.fade]
            settled = row.fade - row.begin
            below.append(scores[:, settled:].clone())
            yield slice(row.begin, row.fade), slice(column.begin, column.fade), scores[:, :settled]
        above = torch.cat(below, -1)


def resized(scores: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Bilinear interpolation of scores [C, h, w] to `size`, a band of rows at a time, each of at most 256 MiB.

    Pixels are areas: the first and last lie half a pixel inside, as where images are resized. Where `size` is smaller,
    all pixels count (antialiasing), and there is one band.

    Yields:
        rows, scores f32 [C, len(rows), width].
    """
    height, width = size
    if height <= scores.shape[1] and width <= scores.shape[2]:
        small = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False, antialias=True)
        yield slice(0, height), small[0]
        return
    band = max(1, _BAND_VALUES // (len(scores) * width))
    for top in range(0, height, band):
        rows = torch.arange(top, min(top + band, height), device=scores.device)
        places = ((rows + 0.5) * (scores.shape[1] / height) - 0.5).clamp(0, scores.shape[1] - 1)
        low = places.long()
        high = (low + 1).clamp(max=scores.shape[1] - 1)
        between = torch.lerp(scores[:, low], scores[:, high], (places - low)[:, None])  # [C, rows, w]
        wide = F.interpolate(between[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]
        yield slice(top, top + len(rows)), wide


def _weighted(scores: Tensor, row: Span, column: Span) -> Tensor:
    """[C, h, w] of what a tile sees → [C, end - begin, end - begin] with its weights."""
    scores = scores[
        :, row.begin - row.start : row.end - row.start, column.begin - column.start : column.end - column.start
    ]
    return scores * row.weights(scores.device)[:, None] * column.weights(scores.device)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
