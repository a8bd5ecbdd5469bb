"""Masks from scores: the CAM mask, the context mask and their merge (E2, E3, E11, E12).

B images · L object classes · K = L+1 classes, 0 is background · masks are uint8 with 255 for ignore. Nothing here is
differentiated. `rules` is `paper` or `authors`: each function reads one row of the table in docs/method.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
EPSILON = 1e-5


def with_background(tags: Tensor) -> Tensor:
    """Tags bool [B, L] → classes bool [B, K]: background is part of every image."""
    return F.pad(tags, (1, 0), value=True)


def resize_like(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """[B, H, W] or [B, C, H, W] resized bilinearly, corners aligned, as floating point."""
    if maps.shape[-2:] == tuple(size):
        return maps if maps.is_floating_point() else maps.float()
    batched = maps[:, None] if maps.dim() == 3 else maps
    resized = F.interpolate(batched.float(), size=tuple(size), mode="bilinear", align_corners=True)
    return resized[:, 0] if maps.dim() == 3 else resized


@torch.no_grad()
def normalized_heatmap(heatmap: Tensor, tags: Tensor, *, valid: Tensor | None = None, rules: str = "paper") -> Tensor:
    """relu of the heatmap over its spatial maximum, 0 for absent classes (E2); [B, L, H, W] in 0…1.

    `paper` adds ε = 1e-5 to the maximum, `authors` clamps it there. Pixels outside `valid` bool [B, H, W] do not
    take part in the maximum.
    """
    positive = heatmap.float().relu() if heatmap.dtype != torch.float64 else heatmap.relu()
    inside = positive if valid is None else positive * valid[:, None]
    peak = inside.amax((2, 3), keepdim=True)
    peak = peak.clamp(min=EPSILON) if rules == "authors" else peak + EPSILON
    return positive / peak * tags[:, :, None, None]


@torch.no_grad()
def cam_scores(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    *,
    threshold: float,
    rules: str = "paper",
    background_power: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """The rows that the CAM mask compares: background, then the normalised heatmap; [B, K, H, W].

    The background row is (1 - saliency)^background_power (`paper`), or 1 where saliency < threshold and else 0
    (`authors`); without saliency (1 - max_k h̃_k)^background_power.
    """
    objects = normalized_heatmap(heatmap, tags, valid=valid, rules=rules)
    foreground = objects.amax(1) if saliency is None else resize_like(saliency, heatmap.shape[-2:]).to(objects.dtype)
    if rules == "authors" and saliency is not None:
        background = (foreground < threshold).to(objects.dtype)
    else:
        background = (1 - foreground).clamp(min=0) ** background_power
    return torch.cat([background[:, None], objects], 1)


def cam_mask(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    *,
    threshold: float,
    rules: str = "paper",
    background_power: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """The CAM mask M (E2, E3).

    Args:
        heatmap: [B, L, H, W] class scores of the classification head, before any activation.
        tags: bool [B, L].
        saliency: [B, H, W] in 0…1 (resized to the heatmap's grid where it differs), or None.
        threshold: T_a; pixels whose best score is below are ignored.
        rules: `paper` or `authors`, see `cam_scores`.
        background_power: α of the background row.
        valid: bool [B, H, W]; pixels outside are ignored.

    Returns:
        uint8 [B, H, W], 255 is ignore. A tie goes to the lowest class.
    """
    scores = cam_scores(
        heatmap, tags, saliency, threshold=threshold, rules=rules, background_power=background_power, valid=valid
    )
    return mask_from_scores(scores, threshold=threshold, valid=valid)


@torch.no_grad()
def context_scores(
    logits: Tensor, tags: Tensor, saliency: Tensor | None, *, saliency_weight: float = 0.5, rules: str = "paper"
) -> Tensor:
    """The rows that the context mask compares: softmax(logits)·Y, [B, K, H, W].

    Under `authors`, where there is saliency, the background row is w·(1 - saliency) + (1 - w)·softmax background.
    """
    scores = logits.softmax(1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    scores = scores * with_background(tags)[:, :, None, None]
    if rules == "authors" and saliency is not None:
        saliency = resize_like(saliency, logits.shape[-2:]).to(scores.dtype)
        background = saliency_weight * (1 - saliency) + (1 - saliency_weight) * scores[:, 0]
        scores = torch.cat([background[:, None], scores[:, 1:]], 1)
    return scores


def context_mask(
    logits: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    *,
    threshold: float,
    saliency_weight: float = 0.5,
    rules: str = "paper",
    valid: Tensor | None = None,
) -> Tensor:
    """The context mask M' (E11): the E3 rule on softmax(logits)·Y, not renormalised.

    Args:
        logits: [B, K, H, W] of the segmentation head, usually on the augmented features.
        tags: bool [B, L].
        saliency: [B, H, W] in 0…1 or None; read by the `authors` rules only.
        threshold: pixels whose best score is below are ignored.
        saliency_weight: w of the `authors` background row, 0…1.
        rules: `paper` or `authors`, see `context_scores`.
        valid: bool [B, H, W]; pixels outside are ignored.

    Returns:
        uint8 [B, H, W], 255 is ignore.
    """
    scores = context_scores(logits, tags, saliency, saliency_weight=saliency_weight, rules=rules)
    return mask_from_scores(scores, threshold=threshold, valid=valid)


@torch.no_grad()
def mask_from_scores(scores: Tensor, *, threshold: float, valid: Tensor | None = None) -> Tensor:
    """The class of the largest of K rows, ignore where that is below the threshold (E3); uint8 [B, H, W]."""
    best, label = scores.max(1)
    ignored = best < threshold
    if valid is not None:
        ignored = ignored | ~valid
    return label.to(torch.uint8).masked_fill(ignored, IGNORE)


@torch.no_grad()
def merge_masks(first: Tensor, second: Tensor, *, rules: str = "paper") -> Tensor:
    """The merged mask M'' of two uint8 masks (E12).

    0 where both are 0; the object where one mask has it and the other ignores, or where both agree; else ignore.
    An object against background is ignored under `paper` and wins under `authors`.
    """

    def is_object(mask: Tensor) -> Tensor:
        return (mask != 0) & (mask != IGNORE)

    first_yields = ~is_object(first) if rules == "authors" else first == IGNORE
    second_yields = ~is_object(second) if rules == "authors" else second == IGNORE
    takes_first = (first == second) | (is_object(first) & second_yields)
    takes_second = is_object(second) & first_yields
    ignored = torch.full_like(first, IGNORE)
    return torch.where(takes_first, first, torch.where(takes_second, second, ignored))
