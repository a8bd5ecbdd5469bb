"""Dense predictions for images of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PROTOCOLS: dict[str, tuple[tuple[float, ...], bool]] = {
    "single": ((1.0,), False),
    "voc": ((0.75, 1.0, 1.25), True),
    "authors": ((0.75, 1.0, 1.25), True),
}
"""name → (scales, with the mirrored image)"""

DenseFunction = Callable[[Tensor], Tensor]


def pad_to_grid(images: Tensor, stride: int) -> Tensor:
    """Pad [B, 3, H, W] at the right and below with the mean colour until both sides are multiples of stride plus 1.

    Then features lie on pixels 0, stride, 2·stride, … up to the last one, and nothing of the image is cut.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -(width - 1) % stride, 0, -(height - 1) % stride))


def to_pixels(maps: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] of a padded image, interpolated to the pixels of the unpadded one, [B, C, *size]."""
    full = tuple((side - 1) * stride + 1 for side in maps.shape[-2:])
    dense = F.interpolate(maps.float(), size=full, mode="bilinear", align_corners=True)
    return dense[..., : size[0], : size[1]]


def dense(function: DenseFunction, images: Tensor, stride: int) -> Tensor:
    """`function` (images → maps on the feature grid) at every pixel of the images, f32 [B, C, H, W]."""
    return to_pixels(function(pad_to_grid(images, stride)), stride, tuple(images.shape[-2:]))


def dense_protocol(function: DenseFunction, images: Tensor, stride: int, protocol: str) -> Tensor:
    """Scores at every pixel under an evaluation protocol.

    Args:
        function: images f32 [B, 3, H, W] → scores [B, C, h, w] on the feature grid.
        images: of any size; all of the image is used.
        stride: image pixels per feature pixel.
        protocol: `single`: one scale. `voc`: mean over the scales 0.75, 1, 1.25, each with its mirror image.
            `authors`: the mean of that mean and of the element-wise maximum over the scales.

    Returns:
        f32 [B, C, H, W].
    """
    scales, mirrored = PROTOCOLS[protocol]
    maps = [at_scale(function, images, stride, scale, mirrored) for scale in scales]
    if len(maps) == 1:
        return maps[0]
    stacked = torch.stack(maps)
    mean = stacked.mean(0)
    return (mean + stacked.amax(0)) / 2 if protocol == "authors" else mean


def at_scale(function: DenseFunction, images: Tensor, stride: int, scale: float, mirrored: bool) -> Tensor:
    """`dense` of the resized images, brought back to their size; `mirrored`: the mean with the mirror image's."""
    size = tuple(images.shape[-2:])
    scaled = images
    if scale != 1:
        target = [max(1, round(side * scale)) for side in size]
        scaled = F.interpolate(images, size=target, mode="bilinear", align_corners=True)
    maps = dense(function, scaled, stride)
    if mirrored:
        maps = (maps + dense(function, scaled.flip(-1), stride).flip(-1)) / 2
    return maps if scale == 1 else F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
