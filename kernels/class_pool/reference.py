"""The pooling in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5


def class_pool(
    features: Tensor, confidence: Tensor, class_mask: Tensor, *, threshold: float, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mcic.kernels.class_pool`."""
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    weights = pool_weights(confidence.to(compute), class_mask, threshold=threshold, rule=rule).flatten(2)  # [B, K, N]
    sums = weights.sum(2)  # [B, K]
    valid = sums > (1 if rule == "authors" else 0)
    norm = sums + EPSILON if rule == "authors" else sums
    share = weights * (valid / norm.where(valid, 1))[..., None]  # w / Z, 0 for classes that are not valid
    with torch.autocast(features.device.type, enabled=False):
        contexts = torch.einsum("bkn,bdn->bkd", share, features.flatten(2).to(compute))
    return contexts, sums, valid


def pool_weights(confidence: Tensor, class_mask: Tensor, *, threshold: float, rule: str) -> Tensor:
    """The weights w of E5, [B, K, H, W], with no gradient."""
    scores = confidence.detach()
    if rule == "authors":
        scores = scores.relu()
        scores = scores / scores.amax((2, 3), keepdim=True).clamp(min=EPSILON)
    scores = scores * class_mask[:, :, None, None]
    confident = scores > threshold
    if rule == "authors":
        classes = torch.arange(scores.shape[1], device=scores.device)[:, None, None]
        confident &= scores.argmax(1, keepdim=True) == classes
    return scores * confident
