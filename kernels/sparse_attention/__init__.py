"""Thresholded sparse cross-image attention over the memory bank (E7–E9 of docs/method.md).

Derivation of the gradient. Let z be one pixel's scores over the entries it may read, p = softmax(z) and
H = -Σ p log p. The support A = {j : p_j ≥ θ/n or p_j = max p} is piecewise constant in z, so almost everywhere only
the softmax a over A carries a gradient: with m = Σ_A a v,

    da_j = dm·v_j,    dz_j = a_j (da_j - Σ_A a da)        on A, 0 off it,
    dz_j += -dH p_j (log p_j + H)                          on every readable entry,
    dk_j = scale · Σ_i dz_ij q_i,   dq_i = scale · Σ_j dz_ij k_j,   dbias_j = Σ_i dz_ij,   dv_j = Σ_i a_ij dm_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Implementation, Operation, runs_triton

OPERATION = Operation("sparse_attention", Implementation("triton", "sparse_attention.triton", runs_triton))


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_bias: Tensor | None,
    counts: Tensor,
    class_mask: Tensor,
    *,
    scale: float,
    threshold: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Every pixel reads the stored contexts of its image's classes (E7–E9, made sparse by a threshold).

    Scores are `scale · qᵀk + key_bias`. Image b may read slot s of class k where `class_mask[b, k]` and
    `s < counts[k]`; n_b is the number of such entries. An entry is kept when its dense softmax weight is at least
    `threshold / n_b` or the largest of its row; the message is the softmax-weighted sum over the kept entries.
    Where n_b = 0, message, entropy and all gradients are 0. What unread slots hold is never looked at.

    Args:
        query: [B, N, D] floating point; 16-bit inputs are computed with fp32 accumulation.
        keys: [K, S, D], or [heads, K, S, D].
        values: [K, S, E], or [heads, K, S, E]; the messages of the heads are summed.
        key_bias: [K, S] or [heads, K, S] added to the scores unscaled, or None.
        counts: int32 [K], valid slots of each class, 0…S.
        class_mask: bool [B, K], classes that an image may read.
        scale: factor of the dot products, usually 1/√D.
        threshold: θ ≥ 0 relative to the uniform weight; 0 keeps every entry.
        backend: auto | reference | triton | native.

    Returns:
        message [B, N, E] in the query's dtype and entropy [B, N] in nats, f32 (f64 for f64 inputs), of the dense
        softmax, averaged over heads. Differentiable in query, keys, values and key_bias; the support is a constant.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a negative threshold.
    """
    _check(query, keys, values, key_bias, counts, class_mask, threshold)
    implementation = OPERATION.select(backend, query)
    return implementation(query, keys, values, key_bias, counts, class_mask, scale=scale, threshold=threshold)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None, counts: Tensor, class_mask: Tensor,
    threshold: float,
) -> None:  # fmt: skip
    def require(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"sparse_attention: {name} must be {expected}, got {got}")

    require(query.dim() == 3 and query.is_floating_point(), "query", "floating point [B, N, D]", _describe(query))
    batch, _, channels = query.shape
    require(
        keys.dim() in (3, 4) and keys.shape[-1] == channels,
        "keys", f"[K, S, {channels}] or [heads, K, S, {channels}] like the query", _describe(keys),
    )  # fmt: skip
    require(keys.shape[:-1].numel() > 0, "keys", "of at least one class and one slot", _describe(keys))
    require(
        values.shape[:-1] == keys.shape[:-1],
        "values", f"{[*keys.shape[:-1], 'E']} like the keys", _describe(values),
    )  # fmt: skip
    if key_bias is not None:
        require(key_bias.shape == keys.shape[:-1], "key_bias", f"{list(keys.shape[:-1])}", _describe(key_bias))
    classes = keys.shape[-3]
    require(
        counts.shape == (classes,) and counts.dtype == torch.int32, "counts", f"int32 [{classes}]", _describe(counts)
    )
    require(
        class_mask.shape == (batch, classes) and class_mask.dtype == torch.bool,
        "class_mask", f"bool [{batch}, {classes}]", _describe(class_mask),
    )  # fmt: skip
    require(threshold >= 0, "threshold", "0 or more", threshold)
    others = [keys, values, counts, class_mask] + ([] if key_bias is None else [key_bias])
    devices = {tensor.device for tensor in others} - {query.device}
    require(not devices, "every tensor", f"on the query's device {query.device}", sorted(map(str, devices)))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
