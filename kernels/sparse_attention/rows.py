"""Images with few entries: a block of pixels keeps its whole score row on the chip.

The channels stream once for the scores, then the value channels stream once for the message: the normaliser and the
support are exact in between, without a second pass. A score row is held as two blocks side by side, of W0 and W1
entries, since Triton's blocks are powers of two: three classes of 64 slots are 128 + 64 and not 256. W1 = 0 means
that the second block is one column without an entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .entries import class_sizes, entry_rows, num_entries

STEPS = tl.constexpr(4)  # the row kernels take up to STEPS · STEP entries: two blocks of 2 · STEP
BLOCK_K = 32


def row_limit(device: torch.device, dtype: torch.dtype) -> int:
    """Most entries per image that the row kernels take; the streaming kernels take the other images."""
    return STEPS.value * config("sparse_attention_rows_fwd_kernel", device, dtype)["STEP"]


@triton.jit
def load_rows(bank_ptr, b_rows, m_rows, o_c, C, dtype: tl.constexpr):
    """Rows of a bank [·, C], some channels of them, as `dtype`; 0 where masked."""
    mask = m_rows[:, None] & (o_c < C)[None, :]
    return tl.load(bank_ptr + b_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def row_products(
    x_ptr,  # [N, C] of one image
    stride_n, stride_c,
    bank_ptr,  # [K, S, C] of one head
    b_rows0, b_rows1, m_0, m_1, o_n, N, C,
    dtype: tl.constexpr, W1: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of the pixels `o_n` with the entries: two blocks, fp32; pixels beyond N repeat the last one."""
    b_0 = tl.zeros([o_n.shape[0], b_rows0.shape[0]], tl.float32)
    b_1 = tl.zeros([o_n.shape[0], b_rows1.shape[0]], tl.float32)
    p_x = x_ptr + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_n
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_x = tl.load(p_x + o_c[None, :] * stride_c, mask=(o_c < C)[None, :], other=0.0).to(dtype)
        b_bank = load_rows(bank_ptr, b_rows0, m_0, o_c, C, dtype)
        b_0 = tl.dot(b_x, tl.trans(b_bank), b_0, input_precision=PRECISION)
        if W1 > 0:
            b_bank = load_rows(bank_ptr, b_rows1, m_1, o_c, C, dtype)
            b_1 = tl.dot(b_x, tl.trans(b_bank), b_1, input_precision=PRECISION)
    return b_0, b_1


@triton.jit
def store_combination(
    out_ptr,  # [N, C] of one image and head
    bank_ptr,  # [K, S, C] of one head
    b_0, b_1, b_rows0, b_rows1, m_0, m_1, o_n, m_n, factor, C,
    W1: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write factor · Σ_j weight_j row_j of the pixels `o_n`."""
    p_out = out_ptr + o_n.to(tl.int64)[:, None] * C
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_bank = load_rows(bank_ptr, b_rows0, m_0, o_c, C, b_0.dtype)
        b_sum = tl.dot(b_0, b_bank, input_precision=PRECISION)
        if W1 > 0:
            b_bank = load_rows(bank_ptr, b_rows1, m_1, o_c, C, b_0.dtype)
            b_sum = tl.dot(b_1, b_bank, b_sum, input_precision=PRECISION)
        mask = m_n[:, None] & (o_c < C)[None, :]
        tl.store(p_out + o_c[None, :], (b_sum * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_zeros(out_ptr, o_n, m_n, C, BLOCK_C: tl.constexpr):
    """Write zeros for the pixels `o_n` to out [N, C]."""
    p_out = out_ptr + o_n.to(tl.int64)[:, None] * C
    b_zero = tl.zeros([o_n.shape[0], BLOCK_C], out_ptr.dtype.element_ty)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        tl.store(p_out + o_c[None, :], b_zero, mask=m_n[:, None] & (o_c < C)[None, :])


@triton.jit
def _store_starts(starts_ptr, class_mask_ptr, counts_ptr, i_b, K, S, LIMIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """First entry of every class in image `i_b`; -1 for a class that it does not read or that is not of this regime."""
    n = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)
    few = n <= LIMIT
    n = 0
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_sizes = class_sizes(class_mask_ptr, counts_ptr, i_b, o_k, K, S)
        b_starts = n + tl.cumsum(b_sizes, 0) - b_sizes
        b_starts = tl.where((b_sizes > 0) & few, b_starts, -1)
        tl.store(starts_ptr + i_b.to(tl.int64) * K + o_k, b_starts, mask=o_k < K)
        n += tl.sum(b_sizes)


@triton.jit
def _finish_scores(b_z, b_rows, m_j, bias_ptr, scale):
    b_z = b_z * scale
    if bias_ptr is not None:
        b_z += tl.load(bias_ptr + b_rows, mask=m_j, other=0.0).to(tl.float32)[None, :]
    return tl.where(m_j[None, :], b_z, float("-inf"))


@triton.jit
def row_mask(o_j, n):
    """Which columns of a row in memory are used: n, padded to 16 (with zeros), so that vectors of them are moved."""
    return o_j < (n + 15) // 16 * 16


@triton.jit
def _exponentials(b_z, b_max, m_j):
    """e = exp(z - max), Σ e and Σ e (z - max); one block after the other, so that one at a time is there twice."""
    b_z -= b_max[:, None]
    b_e = tl.exp(b_z)
    return b_e, tl.sum(b_e, 1), tl.sum(b_e * tl.where(m_j[None, :], b_z, 0.0), 1)


@triton.jit
def _mark_dropped(b_e, b_cut):
    """Negative where the threshold drops the entry, and the sum of the kept ones."""
    m_keep = b_e >= b_cut[:, None]
    return tl.where(m_keep, b_e, -b_e), tl.sum(tl.where(m_keep, b_e, 0.0), 1)


@triton.jit
def _weights(b_e, b_scale, attention_ptr, o_n, o_j, m_n, n, R, dtype: tl.constexpr, SPARSE: tl.constexpr):
    """The attention in 16 bits for 16-bit inputs; kept with its sign, where it is to be kept."""
    b_e *= b_scale[:, None]
    if attention_ptr is not None:
        p_attention = attention_ptr + (o_n.to(tl.int64)[:, None] * R + o_j[None, :])
        tl.store(p_attention, b_e.to(dtype), mask=m_n[:, None] & row_mask(o_j, n)[None, :])
    if SPARSE:
        b_e = tl.where(b_e < 0, 0.0, b_e)
    return b_e.to(dtype)


@triton.jit
def _forward_block(
    query_ptr, stride_qn, stride_qd, keys_ptr, values_ptr, bias_ptr, counts_ptr, class_mask_ptr,
    message_ptr, entropy_ptr, attention_ptr, stats_ptr, stats_plane,
    scale, threshold, i_b, o_n, N, D, E, K, S, R,
    SPARSE: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pixels `o_n` of image `i_b`, which reads 1 … W0 + W1 entries; pointers stand at the image and head."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    m_n = o_n < N
    o_0 = tl.arange(0, W0)
    o_1 = W0 + tl.arange(0, max(W1, 1))
    b_rows0, n = entry_rows(class_mask_ptr, counts_ptr, i_b, o_0, K, S, BLOCK_K)
    b_rows1, n = entry_rows(class_mask_ptr, counts_ptr, i_b, o_1, K, S, BLOCK_K)
    m_0, m_1 = o_0 < n, o_1 < n
    b_z0, b_z1 = row_products(
        query_ptr, stride_qn, stride_qd, keys_ptr, b_rows0, b_rows1, m_0, m_1, o_n, N, D,
        dtype, W1, BLOCK_D, PRECISION,
    )  # fmt: skip
    b_z0 = _finish_scores(b_z0, b_rows0, m_0, bias_ptr, scale)
    b_z1 = _finish_scores(b_z1, b_rows1, m_1, bias_ptr, scale)
    b_max = tl.maximum(tl.max(b_z0, 1), tl.max(b_z1, 1))
    b_e0, b_total, b_mean = _exponentials(b_z0, b_max, m_0)
    b_e1, b_total1, b_mean1 = _exponentials(b_z1, b_max, m_1)
    b_total += b_total1
    b_mean += b_mean1
    b_inverse = 1.0 / b_total
    b_log = tl.log(b_total)
    tl.store(entropy_ptr + o_n, b_log - b_mean * b_inverse, mask=m_n)

    b_kept = b_total
    if SPARSE:
        b_largest = tl.maximum(tl.max(b_e0, 1), tl.max(b_e1, 1))  # what exp made of the row's maximum
        b_cut = tl.minimum(b_total * (threshold / n), b_largest)
        b_e0, b_kept0 = _mark_dropped(b_e0, b_cut)
        b_e1, b_kept1 = _mark_dropped(b_e1, b_cut)
        b_kept = b_kept0 + b_kept1
    if stats_ptr is not None:
        tl.store(stats_ptr + o_n, b_max, mask=m_n)
        tl.store(stats_ptr + stats_plane + o_n, b_max + b_log, mask=m_n)
        tl.store(stats_ptr + 2 * stats_plane + o_n, b_total / b_kept, mask=m_n)
    b_kept = 1.0 / b_kept
    b_a0 = _weights(b_e0, b_kept, attention_ptr, o_n, o_0, m_n, n, R, dtype, SPARSE)
    b_a1 = b_a0
    if W1 > 0:
        b_a1 = _weights(b_e1, b_kept, attention_ptr, o_n, o_1, m_n, n, R, dtype, SPARSE)
    store_combination(
        message_ptr, values_ptr, b_a0, b_a1, b_rows0, b_rows1, m_0, m_1, o_n, m_n, 1.0, E, W1, BLOCK_E, PRECISION
    )


@triton.jit
def sparse_attention_rows_fwd_kernel(
    query_ptr,  # [B, N, D], any strides
    keys_ptr,  # [h, K, S, D]
    values_ptr,  # [h, K, S, E]
    bias_ptr,  # [h, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    message_ptr,  # out [h, B, N, E]
    entropy_ptr,  # out f32 [h, B, N]
    attention_ptr,  # out [h, B, N, R] or None
    stats_ptr,  # out f32 [3, h, B, N] or None
    starts_ptr,  # out i32 [B, K] or None
    stride_qb, stride_qn, stride_qd, scale, threshold, N, D, E, K, S, R,
    SPARSE: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of pixels of image i_b in head i_h; nothing where the image reads more than STEPS · STEP entries."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if starts_ptr is not None and i_n + i_h == 0:
        _store_starts(starts_ptr, class_mask_ptr, counts_ptr, i_b, K, S, STEPS * STEP, BLOCK_K)
    n = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)

    i_head = i_h.to(tl.int64)
    i_pixels = (i_head * tl.num_programs(1) + i_b) * N  # first pixel of the image in [h, B, N]
    stats_plane = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * N
    query_ptr += i_b.to(tl.int64) * stride_qb
    keys_ptr += i_head * K * S * D
    values_ptr += i_head * K * S * E
    if bias_ptr is not None:
        bias_ptr += i_head * K * S
    message_ptr += i_pixels * E
    entropy_ptr += i_pixels
    if attention_ptr is not None:
        attention_ptr += i_pixels * R
    if stats_ptr is not None:
        stats_ptr += i_pixels
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if n == 0:
        store_zeros(message_ptr, o_n, o_n < N, E, BLOCK_E)
        tl.store(entropy_ptr + o_n, tl.zeros([BLOCK_N], tl.float32), mask=o_n < N)
    elif n <= STEP:
        _forward_block(
            query_ptr, stride_qn, stride_qd, keys_ptr, values_ptr, bias_ptr, counts_ptr, class_mask_ptr,
            message_ptr, entropy_ptr, attention_ptr, stats_ptr, stats_plane, scale, threshold,
            i_b, o_n, N, D, E, K, S, R, SPARSE, STEP, 0, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif n <= STEP + STEP // 2:
        _forward_block(
            query_ptr, stride_qn, stride_qd, keys_ptr, values_ptr, bias_ptr, counts_ptr, class_mask_ptr,
            message_ptr, entropy_ptr, attention_ptr, stats_ptr, stats_plane, scale, threshold,
            i_b, o_n, N, D, E, K, S, R, SPARSE, STEP, STEP // 2, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif n <= 2 * STEP:  # half the pixels at a time: their rows fill the registers
        for i_half in range(2):
            o_half = i_n * BLOCK_N + i_half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            _forward_block(
                query_ptr, stride_qn, stride_qd, keys_ptr, values_ptr, bias_ptr, counts_ptr, class_mask_ptr,
                message_ptr, entropy_ptr, attention_ptr, stats_ptr, stats_plane, scale, threshold,
                i_b, o_half, N, D, E, K, S, R, SPARSE, STEP, STEP, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip
    elif n <= STEPS * STEP:
        for i_quarter in range(4):
            o_quarter = i_n * BLOCK_N + i_quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _forward_block(
                query_ptr, stride_qn, stride_qd, keys_ptr, values_ptr, bias_ptr, counts_ptr, class_mask_ptr,
                message_ptr, entropy_ptr, attention_ptr, stats_ptr, stats_plane, scale, threshold,
                i_b, o_quarter, N, D, E, K, S, R, SPARSE, 2 * STEP, 2 * STEP, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip


def rows_forward(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, counts: Tensor, class_mask: Tensor, *,
    scale: float, threshold: float, precision: str, message: Tensor, entropy: Tensor,
    attention: Tensor | None, stats: Tensor | None, starts: Tensor | None,
) -> None:  # fmt: skip
    """Write what the images with at most `row_limit` entries get.

    Args:
        query: [B, N, D]; keys [h, K, S, D] and values [h, K, S, E] of its dtype, bias [h, K, S]: contiguous.
        precision: of the products of fp32 inputs, ieee or tf32.
        message: out [h, B, N, E]; the query's dtype, or fp32 where the heads are still to be summed.
        entropy: out f32 [h, B, N].
        attention: out [h, B, N, R] in the query's dtype: dense softmax / Σ of the kept softmax, that is the attention,
            negative where the threshold dropped the entry.
        stats: out f32 [3, h, B, N]: the scores' maximum, their log-sum-exp, 1 / Σ of the kept softmax.
        starts: out i32 [B, K]: first entry of class k in image b, -1 where the backward row kernels have none.
    """
    batch, pixels, channels = query.shape
    heads, classes, slots, out = values.shape
    settings = config("sparse_attention_rows_fwd_kernel", query.device, query.dtype)
    grid = (triton.cdiv(pixels, settings["BLOCK_N"]), batch, heads)
    sparse_attention_rows_fwd_kernel[grid](
        query, keys, values, bias, counts, class_mask, message, entropy, attention, stats, starts,
        *query.stride(), scale, threshold, pixels, channels, out, classes, slots,
        0 if attention is None else attention.shape[-1],
        SPARSE=threshold > 0, BLOCK_K=BLOCK_K, PRECISION=precision, **settings,
    )  # fmt: skip
