"""Forward kernels for images that read many keys: scores are computed block by block and never kept.

With a threshold the support needs the exact normaliser, so the keys are visited twice: for the statistics of the rows
and then for the message. Without one, a single visit that rescales as the row maximum grows gives both. The statistics
of a row of scores z are its maximum m, l = log Σ exp z, and 1 / Σ p over the kept entries, where p = exp(z - l).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .entries import class_sizes, num_entries

# Score of an entry that may not be read: its exponential is 0 and, unlike -inf, products with that are 0 too.
UNREADABLE = tl.constexpr(-1.0e20)

BLOCK_CLASSES = 128  # how many classes are counted at a time


@triton.jit
def load_tile(
    ptr, stride_row, stride_column, m_rows, first, SIZE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Columns first … first + BLOCK of the consecutive rows [R, SIZE] at ptr where m_rows [R] holds, else 0."""
    o_r, o_c = tl.arange(0, m_rows.shape[0]), tl.arange(0, BLOCK)
    mask = m_rows[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (first + o_c < SIZE)[None, :]
    tile_ptr = ptr + first * stride_column + o_r[:, None] * stride_row + o_c[None, :] * stride_column
    return tl.load(tile_ptr, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def row_products(
    left_ptr, stride_row, stride_column, m_left, right_ptr, m_right, size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products, fp32 [R, C], of the strided rows left_ptr [R, SIZE] with the contiguous right_ptr [C, SIZE].

    `size` is SIZE, as a number that the compiler does not know: else it unrolls the loop and runs out of registers.
    """
    b_products = tl.zeros((m_left.shape[0], m_right.shape[0]), tl.float32)
    for first in range(0, size, BLOCK):
        b_left = load_tile(left_ptr, stride_row, stride_column, m_left, first, SIZE, BLOCK, DTYPE)
        b_right = load_tile(right_ptr, SIZE, 1, m_right, first, SIZE, BLOCK, DTYPE)
        b_products = tl.dot(b_left, tl.trans(b_right), b_products, input_precision=PRECISION)
    return b_products


@triton.jit
def masked_scores(b_products, bias_ptr, i_m, m_m, scale):
    """Scores [R, C] from the products of queries and keys i_m, i_m + 1, …; bias_ptr [heads · K · S] or None."""
    b_z = b_products * scale
    if bias_ptr is not None:
        b_z += tl.load(bias_ptr + i_m + tl.arange(0, m_m.shape[0]), mask=m_m, other=0.0).to(tl.float32)[None, :]
    return tl.where(m_m[None, :], b_z, UNREADABLE)


@triton.jit
def grow(b_max, b_sum, b_tilt, b_z):
    """Take the scores b_z into the running row maximum, Σ exp(z - max) and Σ exp(z - max) (z - max).

    Returns these, exp(z - max), and the factor that sums over earlier scores must be multiplied with.
    """
    b_new = tl.maximum(b_max, tl.max(b_z, 1))
    b_rescale = tl.exp(b_max - b_new)
    b_shifted = b_z - b_new[:, None]
    b_e = tl.exp(b_shifted)
    b_tilt = b_rescale * (b_tilt + (b_max - b_new) * b_sum) + tl.sum(b_e * b_shifted, 1)
    b_sum = b_rescale * b_sum + tl.sum(b_e, 1)
    return b_new, b_sum, b_tilt, b_e, b_rescale


@triton.jit
def store_statistics(entropy_ptr, stats_ptr, plane, o_rows, m_rows, b_max, b_sum, b_tilt):
    """Maximum, log-sum-exp and entropy of the dense softmax; 0 where there is nothing to read."""
    m_any = b_sum > 0
    b_sum = tl.where(m_any, b_sum, 1.0)
    b_log = tl.log(b_sum)
    b_max = tl.where(m_any, b_max, 0.0)
    tl.store(stats_ptr + o_rows, b_max, mask=m_rows)
    tl.store(stats_ptr + plane + o_rows, b_max + b_log, mask=m_rows)
    tl.store(entropy_ptr + o_rows, b_log - b_tilt / b_sum, mask=m_rows)


@triton.jit
def cutoff(b_max, b_lse, n_b, log_threshold, SLACK: tl.constexpr):
    """Lowest score that is kept: where p ≥ θ / n_b, and the maximum always.

    Scores are compared, not probabilities, whose rounding may depend on how a compiler contracts exp(z - l). The slack
    has the size of what two kernels may make of one score, see `slack`: the maximum stays in both.
    """
    b_slack = tl.maximum(tl.abs(b_max), 1.0) * SLACK
    return tl.minimum(b_max - b_slack, b_lse + (log_threshold - tl.log(tl.maximum(n_b, 1).to(tl.float32))))


@triton.jit
def sparse_attention_stream_stats_fwd_kernel(
    query_ptr,  # [B, N, D], strided
    keys_ptr,  # [heads, K, S, D]
    bias_ptr,  # [heads, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    entropy_ptr,  # f32 [heads, B, N]
    stats_ptr,  # f32 [3, heads, B, N]; the first two are written
    totals_ptr,  # i32 [B] or None; n_b of every image is written
    stride_qb, stride_qn, stride_qd, scale, row_limit, B, N, K, S, num_channels,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics and entropy of a block of pixels of one image under one head."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_b = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)
    if totals_ptr is not None and i_n + i_h == 0:
        tl.store(totals_ptr + i_b, n_b)
    if n_b <= row_limit:
        return
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    q_ptr = query_ptr + i_b.to(tl.int64) * stride_qb + (i_n * BLOCK_N).to(tl.int64) * stride_qn

    b_max = tl.full((BLOCK_N,), UNREADABLE, tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_tilt = tl.zeros((BLOCK_N,), tl.float32)
    for i_k in range(0, K):
        num_slots = class_sizes(class_mask_ptr, counts_ptr, i_b, i_k, K, S)
        for first in range(0, num_slots, BLOCK_M):
            m_m = first + tl.arange(0, BLOCK_M) < num_slots
            i_m = (i_h * K + i_k) * S + first
            b_qk = row_products(
                q_ptr, stride_qn, stride_qd, m_n, keys_ptr + i_m * D, m_m, num_channels, D, BLOCK_D, DTYPE, PRECISION
            )
            b_z = masked_scores(b_qk, bias_ptr, i_m, m_m, scale)
            b_max, b_sum, b_tilt, _, _ = grow(b_max, b_sum, b_tilt, b_z)
    plane = tl.num_programs(2).to(tl.int64) * B * N
    store_statistics(entropy_ptr, stats_ptr, plane, (i_h * B + i_b) * N + o_n, m_n, b_max, b_sum, b_tilt)


@triton.jit
def sparse_attention_stream_fwd_kernel(
    query_ptr,  # [B, N, D], strided
    keys_ptr,  # [heads, K, S, D]
    values_ptr,  # [heads, K, S, E]
    bias_ptr,  # [heads, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    message_ptr,  # [heads, B, N, E]
    entropy_ptr,  # f32 [heads, B, N]
    stats_ptr,  # f32 [3, heads, B, N]
    totals_ptr,  # i32 [B] or None; n_b of every image is written
    stride_qb, stride_qn, stride_qd, scale, log_threshold, row_limit, B, N, K, S, num_channels,
    D: tl.constexpr, E: tl.constexpr, THRESHOLDED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """BLOCK_E channels of the message of a block of pixels of one image under one head.

    THRESHOLDED: maximum and log-sum-exp are there; else this kernel writes all the statistics. Where one block holds a
    row of D channels, the queries stay on chip and the loop over the keys is the innermost one, which is pipelined.
    """
    NUM_TILES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    i_h, i_e = (tl.program_id(2) // NUM_TILES).to(tl.int64), tl.program_id(2) % NUM_TILES
    n_b = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)
    if totals_ptr is not None and i_n + tl.program_id(2) == 0:
        tl.store(totals_ptr + i_b, n_b)
    if n_b <= row_limit:
        return
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    q_ptr = query_ptr + i_b.to(tl.int64) * stride_qb + (i_n * BLOCK_N).to(tl.int64) * stride_qn
    if BLOCK_D >= D:
        b_q = load_tile(q_ptr, stride_qn, stride_qd, m_n, 0, D, BLOCK_D, DTYPE)

    o_rows = (i_h * B + i_b) * N + o_n
    plane = (tl.num_programs(2) // NUM_TILES).to(tl.int64) * B * N
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_tilt = tl.zeros((BLOCK_N,), tl.float32)
    if THRESHOLDED:
        b_max = tl.load(stats_ptr + o_rows, mask=m_n, other=0.0)
        b_lse = tl.load(stats_ptr + plane + o_rows, mask=m_n, other=0.0)
        b_cutoff = cutoff(b_max, b_lse, n_b, log_threshold, SLACK)
    else:
        b_max = tl.full((BLOCK_N,), UNREADABLE, tl.float32)
    b_message = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for i_k in range(0, K):
        num_slots = class_sizes(class_mask_ptr, counts_ptr, i_b, i_k, K, S)
        for first in range(0, num_slots, BLOCK_M):
            m_m = first + tl.arange(0, BLOCK_M) < num_slots
            i_m = (i_h * K + i_k) * S + first
            k_ptr = keys_ptr + i_m * D
            if BLOCK_D >= D:
                b_k = load_tile(k_ptr, D, 1, m_m, 0, D, BLOCK_D, DTYPE)
                b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            else:
                b_qk = row_products(
                    q_ptr, stride_qn, stride_qd, m_n, k_ptr, m_m, num_channels, D, BLOCK_D, DTYPE, PRECISION
                )
            b_z = masked_scores(b_qk, bias_ptr, i_m, m_m, scale)
            if THRESHOLDED:
                b_e = tl.where(b_z >= b_cutoff[:, None], tl.exp(b_z - b_max[:, None]), 0.0)
                b_sum += tl.sum(b_e, 1)
            else:
                b_max, b_sum, b_tilt, b_e, b_rescale = grow(b_max, b_sum, b_tilt, b_z)
                b_message *= b_rescale[:, None]
            b_v = load_tile(values_ptr + i_m * E, E, 1, m_m, i_e * BLOCK_E, E, BLOCK_E, DTYPE)
            b_message = tl.dot(b_e.to(DTYPE), b_v, b_message, input_precision=PRECISION)

    b_safe = tl.where(b_sum > 0, b_sum, 1.0)
    b_message = b_message / b_safe[:, None]
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_ne = m_n[:, None] & (o_e < E)[None, :]
    tl.store(message_ptr + o_rows[:, None] * E + o_e[None, :], b_message.to(message_ptr.dtype.element_ty), mask=m_ne)
    if i_e == 0:
        if THRESHOLDED:
            b_kept = b_safe * tl.exp(b_max - b_lse)
            tl.store(stats_ptr + 2 * plane + o_rows, 1.0 / b_kept, mask=m_n)
        else:
            store_statistics(entropy_ptr, stats_ptr, plane, o_rows, m_n, b_max, b_sum, b_tilt)
            tl.store(stats_ptr + 2 * plane + o_rows, tl.full((BLOCK_N,), 1.0, tl.float32), mask=m_n)


def precision() -> str:
    """Precision of the fp32 products: IEEE unless the user of PyTorch allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def slack(dtype: torch.dtype) -> float:
    """How far, relative to the row's maximum, two kernels may round one score apart: tensor cores of different shapes
    cut sums off differently."""
    if dtype != torch.float32:
        return 1e-5
    return 1e-6 if precision() == "ieee" else 1e-4


def log_threshold(threshold: float) -> float:
    return math.log(threshold) if threshold > 0 else -math.inf


def launch_config(kernel: str, query: Tensor, **sizes: int) -> dict[str, int]:
    """The kernel's entry of the table, no block of it larger than what it covers (`BLOCK_D=` number of channels, …)."""
    launch = config(kernel, query.device, query.dtype)
    covers = {name: max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return {name: min(value, covers.get(name, value)) for name, value in launch.items()}


def streaming_forward(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, counts: Tensor, class_mask: Tensor, *,
    scale: float, threshold: float, row_limit: int, message: Tensor, entropy: Tensor, stats: Tensor,
    totals: Tensor | None,
) -> None:  # fmt: skip
    """Write the rows of the images that read more than row_limit entries; those of the others stay untouched.

    Args:
        query: [B, N, D], any strides.
        keys, values, bias: [heads, K, S, D] and [heads, K, S, E] of the query's dtype, [heads, K, S] or None;
            contiguous.
        counts, class_mask: i32 [K] and bool [B, K], contiguous.
        scale, threshold: as in `mcic.kernels.sparse_attention`.
        row_limit: -1 for every image; then a row with nothing to read has message, entropy and first statistics 0.
        message: [heads, B, N, E], contiguous, written.
        entropy: f32 [heads, B, N], contiguous, written.
        stats: f32 [3, heads, B, N], contiguous, written: row maximum, log-sum-exp, 1 / Σ of the kept probabilities.
        totals: i32 [B], written for every image: n_b; or None.
    """
    batch, pixels, channels = query.shape
    heads, classes, slots, out_channels = values.shape
    if batch * pixels == 0:
        return
    sizes = {"D": channels, "BLOCK_K": BLOCK_CLASSES, "PRECISION": precision()}
    numbers = (batch, pixels, classes, slots, channels)
    if threshold > 0:
        launch = launch_config("sparse_attention_stream_stats_fwd_kernel", query, BLOCK_D=channels)
        sparse_attention_stream_stats_fwd_kernel[triton.cdiv(pixels, launch["BLOCK_N"]), batch, heads](
            query, keys, bias, counts, class_mask, entropy, stats, totals, *query.stride(), scale, row_limit,
            *numbers, **sizes, **launch,
        )  # fmt: skip
    covers = {"BLOCK_D": channels, "BLOCK_E": out_channels}
    launch = launch_config("sparse_attention_stream_fwd_kernel", query, **covers)
    # A row that does not fit, or that passes through registers on its way, to be transposed, leaves too few.
    if launch["BLOCK_D"] < channels or query.stride(2) != 1:
        launch = launch_config("sparse_attention_stream_fwd_kernel.wide", query, **covers)
    tiles = triton.cdiv(out_channels, launch["BLOCK_E"])
    sparse_attention_stream_fwd_kernel[triton.cdiv(pixels, launch["BLOCK_N"]), batch, heads * tiles](
        query, keys, values, bias, counts, class_mask, message, entropy, stats,
        None if threshold > 0 else totals, *query.stride(),
        scale, log_threshold(threshold), row_limit, *numbers,
        E=out_channels, THRESHOLDED=threshold > 0, SLACK=slack(query.dtype), **sizes, **launch,
    )  # fmt: skip
