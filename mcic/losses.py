"""The loss terms (E1, E8, E13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcic.ops import labelled_pixels, segmentation_losses
from mcic.pseudo import IGNORE

__all__ = [
    "classification_loss",
    "entropy_loss",
    "labelled_pixels",
    "resize_mask",
    "segmentation_loss",
    "spatial_mean",
    "weighted_segmentation_loss",
]


def spatial_mean(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of [B, C, H, W] over the valid pixels, [B, C]; 0 for an image without any."""
    if valid is None:
        return maps.mean((2, 3))
    weights = valid[:, None].to(maps.dtype)
    return (maps * weights).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1)


def classification_loss(heatmap: Tensor, tags: Tensor, *, valid: Tensor | None = None, rules: str = "paper") -> Tensor:
    """Binary cross-entropy of the heatmap's spatial mean against the tags (E1), mean over classes and images.

    Args:
        heatmap: [B, L, H, W] class scores.
        tags: bool [B, L].
        valid: bool [B, H, W]; only these pixels enter the mean.
        rules: `authors` also divides each image's loss by its number of tags (at least 1).

    Returns:
        Scalar, differentiable in the heatmap.
    """
    scores = spatial_mean(_at_least_f32(heatmap), valid)
    per_image = F.binary_cross_entropy_with_logits(scores, tags.to(scores.dtype), reduction="none").mean(1)
    if rules == "authors":
        per_image = per_image / tags.sum(1).clamp(min=1)
    return per_image.mean()


def entropy_loss(entropy: Tensor, valid: Tensor | None = None, *, count: Tensor | None = None) -> Tensor:
    """Mean attention entropy in nats over the valid pixels (E8).

    Args:
        entropy: [B, N].
        valid: bool [B, H, W] with H·W = N; None: all.
        count: scalar to divide by, e.g. the valid pixels of the batch over all ranks; default: this batch's own.
    """
    if valid is None:
        return entropy.mean()
    inside = valid.flatten(1)
    return (entropy * inside).sum() / (inside.sum() if count is None else count).clamp(min=1)


def segmentation_loss(logits: Tensor, mask: Tensor, *, count: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Cross-entropy over the labelled pixels (E13), of one map and one mask; `ops.segmentation_losses` takes several.

    Args:
        logits: [B, K, H, W].
        mask: uint8 [B, H', W'], 255 is ignore. Where its size differs from the logits', its one-hot form is resized
            bilinearly (corners aligned) and a pixel keeps the class that has more than half.
        count: scalar Z(M) to divide by, e.g. that of the batch over all ranks; default: this mask's own.
        backend: who computes it.

    Returns:
        Scalar, 0 where nothing is labelled; differentiable in the logits.
    """
    if mask.shape[-2:] != logits.shape[-2:]:
        mask = resize_mask(mask, logits.shape[1], logits.shape[-2:])
    counts = None if count is None else count[None]
    return segmentation_losses(logits, None, mask[None], counts=counts, backend=backend)[0, 0]


def weighted_segmentation_loss(
    logits: Tensor, mask: Tensor, confidence: Tensor, *, total: Tensor | None = None
) -> Tensor:
    """Cross-entropy over the labelled pixels, each weighted with the confidence of its label.

    Args:
        logits: [B, K, H, W].
        mask: uint8 [B, H, W], 255 is ignore.
        confidence: f32 [B, H, W] in 0…1.
        total: scalar Σ confidence over the labelled pixels to divide by, e.g. that of the batch over all ranks;
            default: this mask's own.

    Returns:
        Scalar, 0 where nothing is labelled; differentiable in the logits.
    """
    losses = F.cross_entropy(_at_least_f32(logits), mask.long(), ignore_index=IGNORE, reduction="none")
    if total is None:
        total = (confidence * (mask != IGNORE)).sum()
    return (losses * confidence).sum() / total.clamp(min=torch.finfo(torch.float32).tiny)


def resize_mask(mask: Tensor, num_classes: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """A mask on another grid: bilinear one-hot, the class with more than half, else ignore; uint8 [B, *size]."""
    classes = torch.arange(num_classes, device=mask.device, dtype=mask.dtype)
    one_hot = (mask[:, None] == classes[:, None, None]).float()
    share, label = F.interpolate(one_hot, size=tuple(size), mode="bilinear", align_corners=True).max(1)
    return label.to(torch.uint8).masked_fill(share <= 0.5, IGNORE)


def _at_least_f32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
