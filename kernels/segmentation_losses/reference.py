"""The cross-entropies in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pseudo_masks.reference import IGNORE


def segmentation_losses(
    logits: Tensor, context_logits: Tensor | None, masks: Tensor, counts: Tensor | None
) -> Tensor:  # fmt: skip
    """See `mcic.kernels.segmentation_losses`; computes in fp32, or in fp64 where the logits are fp64."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    labels = masks.long()
    counts = labelled_pixels(masks) if counts is None else counts
    rows = []
    for maps in (logits,) if context_logits is None else (logits, context_logits):
        log_softmax = maps.log_softmax(1, dtype=compute)
        # Summed here: the fused sum has no deterministic form on GPUs.
        per_pixel = [F.nll_loss(log_softmax, label, ignore_index=IGNORE, reduction="none") for label in labels]
        rows.append(torch.stack([losses.sum() for losses in per_pixel]))
    return torch.stack(rows) / counts.clamp(min=1)


def labelled_pixels(masks: Tensor) -> Tensor:
    """Z(M): the number of pixels that are not ignore, int64: of a mask uint8 [B, H, W], or [M] of [M, B, H, W]."""
    return (masks != IGNORE).sum((-3, -2, -1))
