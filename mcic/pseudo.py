"""Masks from scores: the CAM mask, the context mask and their merge (E2, E3, E11, E12).

B images · L object classes · K = L+1 classes, 0 is background · masks are uint8 with 255 for ignore. Nothing here is
differentiated. `rules` is `paper` or `authors`: each function reads one row of the table in docs/method.md.

Here saliency may have any size; the rules themselves, and all masks of a batch in one pass, are `ops.pseudo_masks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcic import ops
from mcic.ops import IGNORE, mask_from_scores, merge_masks, normalized_heatmap, with_background

__all__ = [
    "IGNORE",
    "cam_mask",
    "cam_scores",
    "context_mask",
    "context_scores",
    "mask_from_scores",
    "merge_masks",
    "normalized_heatmap",
    "resize_like",
    "with_background",
]


def resize_like(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """[B, H, W] or [B, C, H, W] resized bilinearly, corners aligned, as floating point."""
    if maps.shape[-2:] == tuple(size):
        return maps if maps.is_floating_point() else maps.float()
    batched = maps[:, None] if maps.dim() == 3 else maps
    resized = F.interpolate(batched.float(), size=tuple(size), mode="bilinear", align_corners=True)
    return resized[:, 0] if maps.dim() == 3 else resized


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
    return ops.cam_scores(
        heatmap, tags, _on_grid(saliency, heatmap), threshold=threshold, rules=rules,
        background_power=background_power, valid=valid,
    )  # fmt: skip


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


def context_scores(
    logits: Tensor, tags: Tensor, saliency: Tensor | None, *, saliency_weight: float = 0.5, rules: str = "paper"
) -> Tensor:
    """The rows that the context mask compares: softmax(logits)·Y, [B, K, H, W].

    Under `authors`, where there is saliency, the background row is w·(1 - saliency) + (1 - w)·softmax background.
    """
    saliency = _on_grid(saliency, logits)
    return ops.context_scores(logits, tags, saliency, saliency_weight=saliency_weight, rules=rules)


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


def _on_grid(saliency: Tensor | None, maps: Tensor) -> Tensor | None:
    return None if saliency is None else resize_like(saliency, maps.shape[-2:])
