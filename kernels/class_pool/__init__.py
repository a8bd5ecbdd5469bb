"""Class-wise weighted pooling of features into one context per image and class (E4, E5).

With w_kj the weights below and Z_k = Σ_j w_kj, c_k = Σ_j w_kj f_j / Z_k. Only the features carry a gradient:
df_j = Σ_k (w_kj / Z_k) dc_k over the valid classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Implementation, Operation, runs_triton

OPERATION = Operation("class_pool", Implementation("triton", "class_pool.triton", runs_triton))

RULES = ("paper", "authors")


def class_pool(
    features: Tensor,
    confidence: Tensor,
    class_mask: Tensor,
    *,
    threshold: float,
    rule: str = "paper",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the confident features of each class of each image into its context (E4, E5).

    Args:
        features: [B, D, H, W] floating point.
        confidence: [B, K, H, W]: probabilities under `paper`, raw logits under `authors`.
        class_mask: bool [B, K], classes of the image (background is one of them).
        threshold: T_b; a weight counts where it is above.
        rule: `paper`: w = confidence where it is above T_b. `authors`: w = relu(logit) over its spatial maximum
            (at least 1e-5), where it is above T_b and its class has the pixel's largest such value.
        backend: auto | reference | triton | native.

    Returns:
        contexts f32 [B, K, D] (0 where not valid), weight_sums f32 [B, K], and valid bool [B, K]: Σw > 0 under
        `paper`, Σw > 1 under `authors`. All f64 for f64 features. Differentiable in the features.

    Raises:
        ValueError: shapes that do not fit or an unknown rule.
    """
    batch, _, height, width = features.shape if features.dim() == 4 else (None,) * 4
    if batch is None or confidence.dim() != 4 or confidence.shape[::2] != (batch, height):
        _fail("features [B, D, H, W] and confidence [B, K, H, W] over one grid", features, confidence)
    if confidence.shape[3] != width or class_mask.shape != confidence.shape[:2]:
        _fail("confidence [B, K, H, W] on the features' grid and class_mask [B, K]", confidence, class_mask)
    if class_mask.dtype != torch.bool:
        raise ValueError(f"class_pool: class_mask must be bool, got {class_mask.dtype}")
    if rule not in RULES:
        raise ValueError(f"class_pool: rule must be one of {', '.join(RULES)}, got {rule!r}")
    implementation = OPERATION.select(backend, features)
    return implementation(features, confidence, class_mask, threshold=threshold, rule=rule)


def _fail(expected: str, *got: Tensor) -> None:
    raise ValueError(f"class_pool: expected {expected}, got {' and '.join(str(list(t.shape)) for t in got)}")
