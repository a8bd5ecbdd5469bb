"""The masks in plain PyTorch: every rule a function of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
EPSILON = 1e-5


@torch.no_grad()
def pseudo_masks(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    valid: Tensor | None,
    *,
    logits: Tensor | None,
    context_heatmap: Tensor | None,
    threshold: float,
    cam_background: str,
    background_power: float,
    context_background: str,
    saliency_weight: float,
    merge_rule: str,
) -> Tensor:
    """See `mcic.kernels.pseudo_masks`; computes in fp32, or in fp64 where a map is fp64."""

    def cam_mask(maps: Tensor) -> Tensor:
        scores = cam_scores(
            maps, tags, saliency, threshold=threshold, rules=cam_background, background_power=background_power,
            valid=valid,
        )  # fmt: skip
        return mask_from_scores(scores, threshold=threshold, valid=valid)

    first = cam_mask(heatmap)
    if context_heatmap is not None:
        second = cam_mask(context_heatmap)
    elif logits is not None:
        scores = context_scores(
            logits, tags, saliency, saliency_weight=saliency_weight, rules=context_background
        )  # fmt: skip
        second = mask_from_scores(scores, threshold=threshold, valid=valid)
    else:
        return first[None]
    return torch.stack([first, second, merge_masks(first, second, rules=merge_rule)])


def with_background(tags: Tensor) -> Tensor:
    """Tags bool [B, L] → classes bool [B, K]: background is part of every image."""
    return F.pad(tags, (1, 0), value=True)


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
    (`authors`); without saliency (1 - max_k h̃_k)^background_power. Saliency is on the heatmap's grid.
    """
    objects = normalized_heatmap(heatmap, tags, valid=valid, rules=rules)
    foreground = objects.amax(1) if saliency is None else saliency.to(objects.dtype)
    if rules == "authors" and saliency is not None:
        background = (foreground < threshold).to(objects.dtype)
    else:
        background = (1 - foreground).clamp(min=0) ** background_power
    return torch.cat([background[:, None], objects], 1)


@torch.no_grad()
def context_scores(
    logits: Tensor, tags: Tensor, saliency: Tensor | None, *, saliency_weight: float = 0.5, rules: str = "paper"
) -> Tensor:
    """The rows that the context mask compares: softmax(logits)·Y, [B, K, H, W].

    Under `authors`, where there is saliency, the background row is w·(1 - saliency) + (1 - w)·softmax background.
    Saliency is on the logits' grid.
    """
    scores = logits.softmax(1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    scores = scores * with_background(tags)[:, :, None, None]
    if rules == "authors" and saliency is not None:
        saliency = saliency.to(scores.dtype)
        background = saliency_weight * (1 - saliency) + (1 - saliency_weight) * scores[:, 0]
        scores = torch.cat([background[:, None], scores[:, 1:]], 1)
    return scores


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
