"""The attention in plain PyTorch: dense scores over the whole bank, everything not readable masked out."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_bias: Tensor | None,
    counts: Tensor,
    class_mask: Tensor,
    *,
    scale: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """See `mcic.kernels.sparse_attention`; computes in fp32, or in fp64 where the query is fp64."""
    attention, entropy, values = _attention(query, keys, values, key_bias, counts, class_mask, scale, threshold)
    with torch.autocast(query.device.type, enabled=False):
        message = torch.einsum("bhnm,hme->bne", attention, values)
    return message.to(query.dtype), entropy


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor | None, counts: Tensor, class_mask: Tensor,
    scale: float, threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    slots = keys.shape[-2]
    stored = torch.arange(slots, device=counts.device) < counts[:, None]  # [K, S]

    def flat(entries: Tensor) -> Tensor:  # [(heads,) K, S, …] -> [heads, M, …], unread slots zeroed: they may hold NaN
        per_head = entries.reshape(-1, stored.numel(), entries.shape[-1]).to(compute)
        return per_head.masked_fill(~stored.flatten()[:, None], 0)

    keys, values = flat(keys), flat(values)
    readable = (class_mask[:, :, None] & stored).flatten(1)[:, None, None]  # [B, 1, 1, M]
    hidden = torch.zeros_like(readable, dtype=compute).masked_fill(~readable, torch.finfo(compute).min / 2)
    if key_bias is not None:
        hidden = hidden + flat(key_bias[..., None])[None, :, None, :, 0]  # [B, heads, 1, M]
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bnd,hmd->bhnm", query.to(compute), keys * scale) + hidden
    log_dense = scores.log_softmax(-1)
    dense = log_dense.exp().masked_fill(~readable, 0)  # [B, heads, N, M]
    entropy = -(dense * log_dense).sum(-1).mean(1)  # [B, N]
    if threshold == 0:
        return dense, entropy, values
    num_readable = readable.sum(-1, keepdim=True).clamp(min=1)
    keep = (dense >= threshold / num_readable) | (scores == scores.amax(-1, keepdim=True))
    keep = keep & readable
    sparse = scores.masked_fill(~keep, torch.finfo(compute).min).softmax(-1).masked_fill(~keep, 0)
    return sparse, entropy, values


def attention_weights(
    query: Tensor, keys: Tensor, key_bias: Tensor | None, counts: Tensor, class_mask: Tensor, *,
    scale: float, threshold: float,
) -> Tensor:  # fmt: skip
    """The attention itself, [B, heads, N, K, S], for looking at what a pixel reads; not differentiated in training."""
    weights, _, _ = _attention(query, keys, keys, key_bias, counts, class_mask, scale, threshold)
    return weights.unflatten(-1, keys.shape[-3:-1])
