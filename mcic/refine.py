"""Refinement of soft masks: probabilities that follow the edges of the image. CPU and GPU, without gradient.

B images · K classes, 0 is background · N = H·W pixels. Rows of classes that an image does not have are 0 before and
after, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mcic.crf import PROTOCOLS, Protocol, mean_field

Method = Literal["none", "pamr", "crf"]

DILATIONS = (1, 2, 4, 8, 12, 24)


@torch.no_grad()
def refine(probabilities: Tensor, images: Tensor, *, method: Method) -> Tensor:
    """Refine soft masks with the defaults of one method.

    Args:
        probabilities: f32 [B, K, H, W], sums to 1 over K; rows of classes that an image does not have are 0.
        images: f32 [B, 3, H, W], RGB 0…1.
        method: `none` | `pamr`, see there | `crf`, see `dense_crf`.

    Returns:
        f32 [B, K, H, W], of the same kind as `probabilities`.

    Raises:
        ValueError: an unknown method, or images that do not fit the probabilities.
    """
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pamr": pamr, "crf": dense_crf}
    if method == "none":
        return probabilities
    if method not in methods:
        raise ValueError(f"the refinement must be one of none, {', '.join(methods)}, got {method!r}")
    return methods[method](probabilities, images)


@torch.no_grad()
def refine_rows(rows: Tensor, images: Tensor, *, method: Literal["none", "pamr"]) -> Tensor:
    """Refine the rows that masks are taken from while training, on any grid.

    Args:
        rows: f32 [B, R, h, w], scores of 0 and above.
        images: [B, 3, H, W], each channel scaled and shifted by any constants: the grid's corners lie on theirs.
        method: `none` | `pamr`, its neighbours at the distances that it has in the image.

    Returns:
        f32 [B, R, h, w].
    """
    if method == "none":
        return rows
    step = max(1, round((images.shape[-1] - 1) / max(1, rows.shape[-1] - 1)))
    dilations = tuple(sorted({max(1, round(dilation / step)) for dilation in DILATIONS}))
    small = F.interpolate(images.float(), size=rows.shape[-2:], mode="bilinear", align_corners=True)
    return pamr(rows, small, dilations=dilations, skip_zeros=not rows.is_cuda)


@torch.no_grad()
def dense_crf(
    probabilities: Tensor, images: Tensor, *, protocol: Protocol = "affinitynet", iterations: int = 10
) -> Tensor:
    """The mean field of a fully connected CRF (equations and kernels: `mcic.crf`).

    Args:
        probabilities: f32 [B, K, H, W].
        images: f32 [B, 3, H, W], RGB 0…1.
        protocol: kernel weights and widths, a name of `mcic.crf.PROTOCOLS`.
        iterations: updates of all pixels.

    Returns:
        f32 [B, K, H, W], sums to 1 over K.

    Raises:
        ValueError: images that do not fit the probabilities.
    """
    kernels = PROTOCOLS[protocol]
    return _per_image(probabilities, images, lambda p, image: mean_field(p, image, kernels, iterations=iterations))


@torch.no_grad()
def pamr(
    probabilities: Tensor, images: Tensor, *, dilations: tuple[int, ...] = DILATIONS, iterations: int = 10,
    skip_zeros: bool = True,
) -> Tensor:  # fmt: skip
    """Pixel-adaptive mask refinement (Araslanov & Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR
    2020): every pixel takes the mean of its neighbours' probabilities, again and again, weighted by likeness of colour.

        p_i ← Σ_{j ∈ 𝒩(i)} α_ij p_j,    α_i = softmax_j( mean_c -|I_ic - I_jc| / (0.1 σ_ic + 1e-8) )

    𝒩(i): the eight neighbours at each dilation (the pixel itself is not among them; beyond the border the nearest
    pixel inside stands in). σ_ic: standard deviation of colour channel c over the 3×3 neighbourhoods of all dilations.

    Args:
        probabilities: f32 [B, K, H, W].
        images: f32 [B, 3, H, W], RGB 0…1.
        dilations: distances of the neighbours, pixels.
        iterations: how often.
        skip_zeros: leave out the rows that are 0. The host waits for a GPU to find them; without it, never.

    Returns:
        f32 [B, K, H, W], sums to 1 over K.

    Raises:
        ValueError: images that do not fit the probabilities.
    """

    neighbors = _neighbor_places(probabilities.shape[-2:], dilations, probabilities.device)

    def one(rows: Tensor, image: Tensor) -> Tensor:
        weights = _color_affinity(image.float(), neighbors, len(dilations))
        values = rows.flatten(1).T.contiguous()  # [N, K]
        for _ in range(iterations):
            values = F.embedding_bag(neighbors, values, mode="sum", per_sample_weights=weights)
        return values.T.reshape(rows.shape)

    return _per_image(probabilities, images, one, skip_zeros=skip_zeros)


def _neighbor_places(size: torch.Size, dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """Flat indices of every pixel's neighbours, int32 [N, 8·len(dilations)]."""
    height, width = size
    rows, columns = (torch.arange(side, device=device, dtype=torch.int32) for side in size)
    places = [
        (rows[:, None] + down * dilation).clamp(0, height - 1) * width
        + (columns + right * dilation).clamp(0, width - 1)
        for dilation in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if down or right
    ]
    return torch.stack(places, 2).flatten(0, 1)


def _color_affinity(image: Tensor, neighbors: Tensor, num_dilations: int) -> Tensor:
    """α, f32 [N, P]: one colour channel at a time, as the neighbours of all pixels take much memory."""
    scores = torch.zeros(neighbors.shape, device=image.device)
    for channel in image.flatten(1):
        around, own = channel[neighbors.long()], channel[:, None]
        # The centre belongs to the 3×3 neighbourhood of every dilation.
        sample = torch.cat([around, own.expand(-1, num_dilations)], 1)
        scores -= (around - own).abs_() / (0.1 * sample.std(1, keepdim=True) + 1e-8)
    return (scores / len(image)).softmax(1)


def _per_image(
    probabilities: Tensor, images: Tensor, one: Callable[[Tensor, Tensor], Tensor], *, skip_zeros: bool = True
) -> Tensor:
    """Apply `one` (f32 [K', H, W] and [3, H, W] → [K', H, W]) image by image, to all rows or those that are not 0."""
    expected = [probabilities.shape[0], 3, *probabilities.shape[2:]]
    if list(images.shape) != expected:
        raise ValueError(f"the images of probabilities {list(probabilities.shape)} must be {expected}, "
                         f"got {list(images.shape)}")  # fmt: skip
    if not skip_zeros:
        return torch.stack([one(rows.float(), image) for rows, image in zip(probabilities, images, strict=True)])
    result = torch.zeros_like(probabilities, dtype=torch.float32)
    for out, rows, image in zip(result, probabilities, images, strict=True):
        present = rows.flatten(1).amax(1).nonzero()[:, 0]
        if len(present):
            out[present] = one(rows[present].float(), image)
    return result
