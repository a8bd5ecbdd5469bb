"""The attention in Triton: two custom operators, forward and backward, over two regimes of kernels.

Images with few entries go through the row kernels, which hold whole score rows on the chip; images with many go
through the streaming kernels. A program leaves at once where its image is of the other regime: which one it is stays
on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .rows import row_limit, rows_forward
from .rows_backward import rows_backward
from .streaming import precision, streaming_forward
from .streaming_backward import streaming_backward

COLUMNS = 16  # channels and the kept attention's rows are padded to a multiple of it: whole vectors are moved


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
    """See `mcic.kernels.sparse_attention`; products of 16-bit queries in 16 bits, sums in fp32.

    Entries whose scores lie within a rounding of exp of their row's maximum count as equal to it. A bank of another
    dtype than the query's is converted first, and channels that are no multiple of 16 are padded, in copies.
    """
    if keys.dim() == 3:
        keys, values = keys[None], values[None]
        key_bias = None if key_bias is None else key_bias[None]
    out = values.shape[-1]
    query = _padded(query)
    keys, values = (_padded(tensor.to(query.dtype)).contiguous() for tensor in (keys, values))
    key_bias = None if key_bias is None else key_bias.contiguous()
    differentiable = (query, keys, values) if key_bias is None else (query, keys, values, key_bias)
    query = _within_int32(query)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    message, entropy, *_ = sparse_attention_fwd(
        query, keys, values, key_bias, counts.contiguous(), class_mask.contiguous(), scale, threshold, save
    )
    return message[..., :out], entropy


def _padded(tensor: Tensor) -> Tensor:
    """Zeros behind the last axis, up to a multiple of COLUMNS."""
    missing = -tensor.shape[-1] % COLUMNS
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _within_int32(pixels: Tensor) -> Tensor:
    """[B, N, C] whose offsets from channel to channel, which the kernels take in 32 bits, stay in range."""
    return pixels.contiguous() if pixels.shape[2] * pixels.stride(2) >= 2**31 else pixels


def _regimes(query: Tensor, keys: Tensor) -> tuple[int, bool]:
    """Most entries of an image that the row kernels take, -1 for none; and whether the streaming kernels may be needed.

    Banks with more slots per class than the row kernels take are for the streaming kernels alone.
    """
    limit = row_limit(query.device, query.dtype)
    slots = keys.shape[2]
    return (-1, True) if slots > limit else (limit, keys.shape[1] * slots > limit)


def _saved_shapes(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of what the forward pass keeps for the backward pass."""
    (batch, pixels, _), (heads, classes, slots, out) = query.shape, values.shape
    limit, streams = _regimes(query, keys)
    row = 0 if limit < 0 else -(-min(limit, classes * slots) // COLUMNS) * COLUMNS
    each_head = heads > 1
    return {
        "messages": ([heads, batch, pixels, out] if each_head and streams else [0], torch.float32),
        "entropies": ([heads, batch, pixels] if each_head else [0], torch.float32),
        "attention": ([heads, batch, pixels, row] if row else [0], query.dtype),
        "stats": ([3, heads, batch, pixels], torch.float32),
        "starts": ([batch, classes], torch.int32),
        "totals": ([batch] if streams else [0], torch.int32),
    }


@torch.library.custom_op("mcic::sparse_attention_fwd", mutates_args=())
def sparse_attention_fwd(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_bias: Tensor | None,
    counts: Tensor,
    class_mask: Tensor,
    scale: float,
    threshold: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """message [B, N, E], entropy [B, N] and, if `save`, what the backward pass needs (`_saved_shapes`), else empty.

    Takes [heads, K, S, ·] keys, values and bias, contiguous as counts and class_mask are, keys and values in the
    query's dtype, D and E multiples of COLUMNS.
    """
    (batch, pixels, _), (heads, _, _, out) = query.shape, values.shape
    limit, streams = _regimes(query, keys)
    message = query.new_empty(batch, pixels, out)
    entropy = query.new_empty(batch, pixels, dtype=torch.float32)
    messages, entropies = message[None], entropy[None]
    if heads > 1:
        messages = message.new_empty(heads, batch, pixels, out, dtype=torch.float32)
        entropies = entropy.new_empty(heads, batch, pixels)
    shapes = _saved_shapes(query, keys, values)
    saved = {name: query.new_empty(shape if save else [0], dtype=dtype) for name, (shape, dtype) in shapes.items()}
    attention, stats, starts, totals = (
        saved[name] if save else None for name in ("attention", "stats", "starts", "totals")
    )
    tensors = (query, keys, values, key_bias, counts, class_mask)
    numbers = {"scale": scale, "threshold": threshold}
    if message.numel():
        with torch.cuda.device_of(query):
            if limit >= 0:
                rows_forward(
                    *tensors, **numbers, precision=precision(), message=messages, entropy=entropies,
                    attention=attention, stats=stats, starts=starts,
                )  # fmt: skip
            if streams:
                stats = torch.empty(shapes["stats"][0], device=query.device) if stats is None else stats
                streaming_forward(
                    *tensors, **numbers, row_limit=limit, message=messages, entropy=entropies, stats=stats,
                    totals=totals,
                )  # fmt: skip
    if heads > 1:
        torch.sum(messages, 0, out=message) if message.dtype == torch.float32 else message.copy_(messages.sum(0))
        torch.mean(entropies, 0, out=entropy)
        if save:
            saved["entropies"] = entropies
            saved["messages"] = messages if streams else saved["messages"]
    return message, entropy, *saved.values()


@sparse_attention_fwd.register_fake
def _(query, keys, values, key_bias, counts, class_mask, scale, threshold, save):
    saved = _saved_shapes(query, keys, values)
    return (
        query.new_empty(*query.shape[:2], values.shape[-1]),
        query.new_empty(query.shape[:2], dtype=torch.float32),
        *(query.new_empty(shape if save else [0], dtype=dtype) for shape, dtype in saved.values()),
    )


@torch.library.custom_op("mcic::sparse_attention_bwd", mutates_args=())
def sparse_attention_bwd(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_bias: Tensor | None,
    counts: Tensor,
    class_mask: Tensor,
    message: Tensor,
    entropy: Tensor,
    attention: Tensor,
    stats: Tensor,
    starts: Tensor,
    totals: Tensor,
    d_message: Tensor,
    d_entropy: Tensor | None,
    scale: float,
    threshold: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, values and bias; empty where `wants` says that one is not wanted.

    Takes what the forward operator took and kept, message and entropy of the single heads, and `d_entropy` of each
    head's entropy.
    """
    limit, streams = _regimes(query, keys)
    d_message = _within_int32(d_message)
    heads = keys.shape[0]
    gradients = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
        for tensor, want in zip((query, keys, values, key_bias), wants, strict=True)
    ]
    buffers = list(gradients)  # what the kernels write
    if wants[0]:
        buffers[0] = gradients[0][None]
        if heads > 1:
            buffers[0] = query.new_empty(heads, *query.shape, dtype=torch.float32)
    covered = limit >= 0 and d_message.numel() and keys.numel()
    for i, want in enumerate(wants[1:], 1):
        if want and streams and limit >= 0:  # both kinds of kernels add to them
            buffers[i] = torch.empty_like(gradients[i], dtype=torch.float32)
        if want and not covered:
            buffers[i].zero_()
    if wants[0] and not d_message.numel():
        buffers[0].zero_()
    names = ("d_query", "d_keys", "d_values", "d_bias")
    outputs = {"scale": scale, "threshold": threshold} | dict(zip(names, buffers, strict=True))
    if d_message.numel():
        d_entropy = None if d_entropy is None else d_entropy.contiguous()
        with torch.cuda.device_of(query):
            if limit >= 0:
                rows_backward(
                    query, keys, values, counts, class_mask, entropy, attention, stats, starts, d_message, d_entropy,
                    precision=precision(), **outputs,
                )  # fmt: skip
            if streams:
                d_entropy = torch.zeros_like(stats[0, 0]) if d_entropy is None else d_entropy
                streaming_backward(
                    query, keys, values, key_bias, counts, class_mask, message, entropy, stats, totals, d_message,
                    d_entropy, row_limit=limit, **outputs,
                )  # fmt: skip
    for gradient, buffer in zip(gradients, buffers, strict=True):
        if gradient is not None and gradient.data_ptr() != buffer.data_ptr():
            gradient.copy_(buffer.sum(0) if buffer.dim() > gradient.dim() else buffer)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


@sparse_attention_bwd.register_fake
def _(query, keys, values, key_bias, counts, class_mask, message, entropy, attention, stats, starts, totals,
      d_message, d_entropy, scale, threshold, wants):  # fmt: skip
    tensors = zip((query, keys, values, key_bias), wants, strict=True)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else query.new_empty(0)
        for tensor, want in tensors
    )


def _setup_context(ctx, inputs, output):
    query, keys, values, key_bias, counts, class_mask, ctx.scale, ctx.threshold, saved = inputs
    message, entropy, messages, entropies, attention, stats, starts, totals = output
    ctx.set_materialize_grads(False)
    if not saved:
        return
    heads = keys.shape[0]
    if heads > 1:
        message, entropy = messages, entropies
    ctx.save_for_backward(
        query, keys, values, key_bias, counts, class_mask, message, entropy, attention, stats, starts,
        totals,
    )  # fmt: skip


def _backward(ctx, d_message, d_entropy, *_):
    wants = list(ctx.needs_input_grad[:4])
    tensors = ctx.saved_tensors
    query, keys, values = tensors[:3]
    if d_message is None and d_entropy is None:
        return (None,) * 9
    if d_message is None:
        d_message = query.new_zeros(()).expand(*query.shape[:2], values.shape[-1])
    if d_entropy is not None and keys.shape[0] > 1:
        d_entropy = d_entropy / keys.shape[0]
    gradients = sparse_attention_bwd(*tensors, d_message, d_entropy, ctx.scale, ctx.threshold, wants)
    return *(gradient if want else None for gradient, want in zip(gradients, wants, strict=True)), *(None,) * 5


sparse_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
