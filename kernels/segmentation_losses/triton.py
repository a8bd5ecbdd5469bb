"""The cross-entropies fused: tiles and their sum forward, one launch backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config


@triton.jit
def _labels(
    masks_ptr,  # u8 [M, B, N]
    i_m,
    i_b,
    o_n,
    B,
    N,
):
    """Labels of a tile in mask `i_m`, i32; ignore beyond the image."""
    row_ptr = masks_ptr + (tl.cast(B, tl.int64) * i_m + i_b) * N
    return tl.load(row_ptr + o_n, mask=o_n < N, other=255).to(tl.int32)


@triton.jit
def _softmax_statistics(
    pixel_ptr,  # [BLOCK_N] pointers to class 0 of the pixels
    m_n,
    K,
    stride_k,
    BLOCK_K: tl.constexpr,
):
    """Largest logit and Σ exp(z - largest); apart, because their log-sum-exp would round large logits' differences."""
    b_max = tl.where(m_n, float("-inf"), 0.0)
    b_sum = tl.zeros_like(b_max)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_z = tl.load(
            pixel_ptr[:, None] + o_k.to(tl.int64)[None, :] * stride_k, mask=m_n[:, None] & m_k[None, :], other=0
        )
        b_z = tl.where(m_k[None, :], b_z.to(tl.float32), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_z - b_new[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


@triton.jit
def _sum_tile(
    logits_ptr,  # [B, K, N], strides stride_b, stride_k, stride_n
    masks_ptr,  # u8 [M, B, N]
    sums_ptr,  # f32 [M, T] of this map
    i_b,
    i_t,
    o_n,
    B,
    K,
    N,
    T,
    stride_b,
    stride_k,
    stride_n,
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_n = o_n < N
    pixel_ptr = logits_ptr + i_b * stride_b + o_n.to(tl.int64) * stride_n
    b_max, b_sum = _softmax_statistics(pixel_ptr, m_n, K, stride_k, BLOCK_K)
    for i_m in tl.static_range(M):
        b_label = _labels(masks_ptr, i_m, i_b, o_n, B, N)
        m_label = b_label < K
        b_z = tl.load(pixel_ptr + b_label.to(tl.int64) * stride_k, mask=m_label, other=0).to(tl.float32)
        tl.store(
            sums_ptr + tl.cast(T, tl.int64) * i_m + i_t, tl.sum(tl.where(m_label, tl.log(b_sum) - (b_z - b_max), 0.0))
        )


@triton.jit
def segmentation_losses_fwd_kernel(
    logits_ptr,  # [B, K, N], strides stride_b, stride_k, stride_n
    context_ptr,  # [B, K, N], strides stride_cb, stride_ck, stride_cn, or None
    masks_ptr,  # u8 [M, B, N]
    sums_ptr,  # f32 [P + 1, M, T]: sums of each tile for each map, then its labelled pixels
    B,
    K,
    N,
    stride_b,
    stride_k,
    stride_n,
    stride_cb,
    stride_ck,
    stride_cn,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n, i_b, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i_t = i_b * tl.num_programs(0) + i_n
    T = tl.num_programs(0) * B
    map_size = tl.cast(T, tl.int64) * M
    if i_p == 0:
        _sum_tile(logits_ptr, masks_ptr, sums_ptr, i_b, i_t, o_n, B, K, N, T, stride_b, stride_k, stride_n, M, BLOCK_K)
        for i_m in tl.static_range(M):
            b_label = _labels(masks_ptr, i_m, i_b, o_n, B, N)
            count_ptr = sums_ptr + tl.num_programs(2) * map_size + tl.cast(T, tl.int64) * i_m + i_t
            tl.store(count_ptr, tl.sum((b_label < K).to(tl.float32)))
    elif context_ptr is not None:
        _sum_tile(
            context_ptr, masks_ptr, sums_ptr + map_size, i_b, i_t, o_n, B, K, N, T, stride_cb, stride_ck, stride_cn,
            M, BLOCK_K,
        )  # fmt: skip


@triton.jit
def segmentation_losses_fwd_sum_kernel(
    sums_ptr,  # f32 [P + 1, M, T]
    counts_ptr,  # [M], or None
    losses_ptr,  # f32 [P, M]
    divisors_ptr,  # f32 [M]
    T,
    BLOCK_T: tl.constexpr,
):
    i_m, i_p = tl.program_id(0), tl.program_id(1)
    M, P = tl.num_programs(0), tl.num_programs(1)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_count = tl.zeros([BLOCK_T], tl.float32)
    for i_t in range(0, T, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_sum += tl.load(sums_ptr + tl.cast(i_p * M + i_m, tl.int64) * T + o_t, mask=m_t, other=0)
        if counts_ptr is None:
            b_count += tl.load(sums_ptr + tl.cast(P * M + i_m, tl.int64) * T + o_t, mask=m_t, other=0)
    count = tl.sum(b_count) if counts_ptr is None else tl.load(counts_ptr + i_m).to(tl.float32)
    divisor = tl.maximum(count, 1.0)
    tl.store(losses_ptr + i_p * M + i_m, tl.sum(b_sum) / divisor)
    if i_p == 0:
        tl.store(divisors_ptr + i_m, divisor)


@triton.jit
def _differentiate_tile(
    grad_ptr,  # f32 [M] of this map, stride_gm
    logits_ptr,  # [B, K, N], strides stride_b, stride_k, stride_n
    grad_logits_ptr,  # [B, K, N], strides stride_db, stride_dk, stride_dn
    masks_ptr,  # u8 [M, B, N]
    divisors_ptr,  # f32 [M]
    i_b,
    o_n,
    B,
    K,
    N,
    stride_gm,
    stride_b,
    stride_k,
    stride_n,
    stride_db,
    stride_dk,
    stride_dn,
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_n = o_n < N
    pixel_ptr = logits_ptr + i_b * stride_b + o_n.to(tl.int64) * stride_n
    grad_pixel_ptr = grad_logits_ptr + i_b * stride_db + o_n.to(tl.int64) * stride_dn
    b_max, b_sum = _softmax_statistics(pixel_ptr, m_n, K, stride_k, BLOCK_K)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_kn = m_n[:, None] & (o_k < K)[None, :]
        b_z = tl.load(pixel_ptr[:, None] + o_k.to(tl.int64)[None, :] * stride_k, mask=m_kn, other=float("-inf"))
        b_p = tl.exp(b_z.to(tl.float32) - b_max[:, None]) / b_sum[:, None]
        b_d = tl.zeros_like(b_p)
        for i_m in tl.static_range(M):
            b_label = _labels(masks_ptr, i_m, i_b, o_n, B, N)
            weight = tl.load(grad_ptr + i_m * stride_gm) / tl.load(divisors_ptr + i_m)
            # p - 1 is exact where a pixel is sure of its label; Σ_m w_m, rounded first, would shift them all alike.
            b_from_label = b_p - tl.where(b_label[:, None] == o_k[None, :], 1.0, 0.0)
            b_d += tl.where(b_label[:, None] < K, weight * b_from_label, 0.0)
        b_d = b_d.to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_pixel_ptr[:, None] + o_k.to(tl.int64)[None, :] * stride_dk, b_d, mask=m_kn)


@triton.jit
def segmentation_losses_bwd_kernel(
    grad_ptr,  # f32 [P, M], strides stride_gp, stride_gm
    logits_ptr,  # [B, K, N], strides stride_b, stride_k, stride_n
    context_ptr,  # [B, K, N], strides stride_cb, stride_ck, stride_cn, or None
    grad_logits_ptr,  # [B, K, N], strides stride_db, stride_dk, stride_dn
    grad_context_ptr,  # [B, K, N], strides stride_eb, stride_ek, stride_en, or None
    masks_ptr,  # u8 [M, B, N]
    divisors_ptr,  # f32 [M]
    B,
    K,
    N,
    stride_gp,
    stride_gm,
    stride_b,
    stride_k,
    stride_n,
    stride_cb,
    stride_ck,
    stride_cn,
    stride_db,
    stride_dk,
    stride_dn,
    stride_eb,
    stride_ek,
    stride_en,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n, i_b, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if i_p == 0:
        _differentiate_tile(
            grad_ptr, logits_ptr, grad_logits_ptr, masks_ptr, divisors_ptr, i_b, o_n, B, K, N, stride_gm,
            stride_b, stride_k, stride_n, stride_db, stride_dk, stride_dn, M, BLOCK_K,
        )  # fmt: skip
    elif context_ptr is not None:
        _differentiate_tile(
            grad_ptr + stride_gp, context_ptr, grad_context_ptr, masks_ptr, divisors_ptr, i_b, o_n, B, K, N, stride_gm,
            stride_cb, stride_ck, stride_cn, stride_eb, stride_ek, stride_en, M, BLOCK_K,
        )  # fmt: skip


def segmentation_losses(
    logits: Tensor, context_logits: Tensor | None, masks: Tensor, counts: Tensor | None
) -> Tensor:  # fmt: skip
    """See `mcic.kernels.segmentation_losses`."""
    losses, _ = _forward(logits, context_logits, masks, counts)
    return losses


@torch.library.custom_op("mcic::segmentation_losses", mutates_args=())
def _forward(
    logits: Tensor, context_logits: Tensor | None, masks: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses f32 [P, M] and the divisors f32 [M]."""
    losses, divisors = _allocate(logits, context_logits, masks)
    if logits.numel() == 0 or masks.numel() == 0:
        return losses.zero_(), divisors.fill_(1) if counts is None else divisors.copy_(counts).clamp_(min=1)
    logits, masks = logits.flatten(2), masks.contiguous()
    counts = None if counts is None else counts.contiguous()
    context_logits = None if context_logits is None else context_logits.flatten(2)
    batch, classes, pixels = logits.shape
    maps, number = losses.shape
    sizes = config("segmentation_losses_fwd_kernel", logits.device, logits.dtype)
    tiles = triton.cdiv(pixels, sizes["BLOCK_N"])
    sums = torch.empty(maps + 1, number, batch * tiles, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        segmentation_losses_fwd_kernel[tiles, batch, maps](
            logits, context_logits, masks, sums, batch, classes, pixels, *logits.stride(),
            *_strides(context_logits), M=number, **sizes,
        )  # fmt: skip
        segmentation_losses_fwd_sum_kernel[number, maps](
            sums, counts, losses, divisors, batch * tiles,
            **config("segmentation_losses_fwd_sum_kernel", logits.device, torch.float32),
        )  # fmt: skip
    return losses, divisors


@_forward.register_fake
def _(logits, context_logits, masks, counts):
    return _allocate(logits, context_logits, masks)


def _allocate(logits: Tensor, context_logits: Tensor | None, masks: Tensor) -> tuple[Tensor, Tensor]:
    maps, number = 1 if context_logits is None else 2, masks.shape[0]
    return logits.new_empty((maps, number), dtype=torch.float32), logits.new_empty(number, dtype=torch.float32)


@torch.library.custom_op("mcic::segmentation_losses_backward", mutates_args=())
def _backward(grad: Tensor, maps: list[Tensor], masks: Tensor, divisors: Tensor) -> list[Tensor]:
    """Gradient of each of one or two maps [B, K, H, W] from that of their losses [P, M]."""
    grads = [_empty_grad(tensor) for tensor in maps]
    if maps[0].numel() == 0:
        return grads
    if masks.shape[0] == 0:
        return [tensor.zero_() for tensor in grads]
    masks = masks.contiguous()
    first, second = (*[tensor.flatten(2) for tensor in maps], None)[:2]
    grad_first, grad_second = (*[tensor.flatten(2) for tensor in grads], None)[:2]
    batch, classes, pixels = first.shape
    sizes = config("segmentation_losses_bwd_kernel", first.device, first.dtype)
    with torch.cuda.device_of(first):
        segmentation_losses_bwd_kernel[triton.cdiv(pixels, sizes["BLOCK_N"]), batch, len(maps)](
            grad, first, second, grad_first, grad_second, masks, divisors, batch, classes, pixels, *grad.stride(),
            *first.stride(), *_strides(second), *grad_first.stride(), *_strides(grad_second),
            M=masks.shape[0], **sizes,
        )  # fmt: skip
    return grads


@_backward.register_fake
def _(grad, maps, masks, divisors):
    return [_empty_grad(tensor) for tensor in maps]


def _empty_grad(maps: Tensor) -> Tensor:
    """Like [B, K, H, W], in its order of memory, such that H and W always merge into one axis."""
    return torch.empty_like(maps.flatten(2)).unflatten(2, maps.shape[2:])


def _strides(maps: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if maps is None else maps.stride()


def _save(ctx, inputs, output):
    logits, context_logits, masks, _ = inputs
    ctx.save_for_backward(logits, context_logits, masks, output[1])


def _differentiate(ctx, grad, _):
    logits, context_logits, masks, divisors = ctx.saved_tensors
    rows = [p for p, needed in enumerate(ctx.needs_input_grad[:2]) if needed]
    maps = [(logits, context_logits)[p] for p in rows]
    grads = dict(zip(rows, _backward(grad[rows[0] : rows[-1] + 1], maps, masks, divisors), strict=True))
    return grads.get(0), grads.get(1), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
