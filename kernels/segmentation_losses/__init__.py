"""The cross-entropies of E13: every mask against one or two logit maps, one pass forward and one backward.

Derivation of the gradient. With z a pixel's K logits, p = softmax(z), Z_m the divisor of mask m and y_m its label
there, mask m's loss is Σ (log Σ_k exp z_k - z_{y_m}) / Z_m over the pixels that it labels. With g_m the incoming
gradient and w_m = g_m / Z_m where the pixel is labelled by m, else 0,

    dz_k = p_k Σ_m w_m - Σ_m w_m [k = y_m],

exactly 0 where no mask labels the pixel. Softmax is computed again in the backward pass: nothing is saved but the
inputs and the M divisors.

Bytes of the fused kernels, an image, P maps of e bytes an element: forward P·N·(e·K + M), backward the same and
e·P·N·K written. At B16, 41×41, 21 classes, two bf16 maps, three masks: 2.4 MB and 4.7 MB, in two launches (tiles,
then their sum in a fixed order) and one; the plain form makes some 40, keeps P log-softmax maps in fp32 and reads each
M times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Implementation, Operation, runs_triton

OPERATION = Operation("segmentation_losses", Implementation("triton", "segmentation_losses.triton", runs_triton))


def segmentation_losses(
    logits: Tensor,
    context_logits: Tensor | None,
    masks: Tensor,
    *,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each map over the labelled pixels of each mask (E13).

    Args:
        logits: s, [B, K, H, W] floating point; 16-bit maps are computed in fp32.
        context_logits: s̃, [B, K, H, W] of the same dtype or another, or None.
        masks: uint8 [M, B, H, W], labels 0…K-1, 255 is ignore. Another label raises on the CPU; on a GPU the pixel
            is passed over.
        counts: [M], Z of each mask to divide by (at least 1), e.g. of the batch over all ranks; None: the number of
            pixels that the mask labels.
        backend: auto | reference | triton | native.

    Returns:
        f32 [P, M] (f64 for f64 logits): row 0 of s, row 1 of s̃ where it is given (P = 2), else P = 1. 0 for a mask
        that labels nothing. Differentiable in both maps.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(logits, context_logits, masks, counts)
    return OPERATION.select(backend, logits)(logits, context_logits, masks, counts)


def _check(logits: Tensor, context_logits: Tensor | None, masks: Tensor, counts: Tensor | None) -> None:
    def require(ok: bool, name: str, expected: str, tensor: Tensor) -> None:
        if not ok or tensor.device != logits.device:
            raise ValueError(
                f"segmentation_losses: {name} must be {expected} on {logits.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )

    require(logits.dim() == 4 and logits.is_floating_point(), "logits", "floating point [B, K, H, W]", logits)
    batch, classes, *grid = logits.shape
    require(1 <= classes <= 255, "logits", "of 1 to 255 classes", logits)
    if context_logits is not None:
        fits = context_logits.shape == logits.shape and context_logits.is_floating_point()
        fits = fits and (context_logits.dtype == torch.float64) == (logits.dtype == torch.float64)
        require(fits, "context_logits", f"floating point {list(logits.shape)} like the logits", context_logits)
    fits = masks.dim() == 4 and masks.shape[1:] == (batch, *grid) and masks.dtype == torch.uint8
    require(fits, "masks", f"uint8 {['M', batch, *grid]}", masks)
    if counts is not None:
        require(counts.shape == masks.shape[:1], "counts", f"[{masks.shape[0]}]", counts)
