"""Backward kernels for images that read many keys: scores are computed again, block by block, wherever they are needed.

With the statistics of the forward pass a block of scores gives the dense probabilities p and the kept ones a; with
δ = dm·m, known before any key is read, dz = a (da - δ) - dH p (log p + H) needs no pass of its own. Each program owns
what it writes and adds in one order. The rows of the query's gradient are owned per block of pixels, those of the bank
per block of slots: a program then goes through the images that read its class.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .entries import class_sizes
from .streaming import (
    UNREADABLE,
    cutoff,
    launch_config,
    load_tile,
    log_threshold,
    masked_scores,
    precision,
    row_products,
    slack,
)  # fmt: skip

BLOCK_IMAGES = tl.constexpr(64)  # how many images are looked at together


@triton.jit
def load_statistics(stats_ptr, plane, m_n, n_b, log_threshold, SLACK: tl.constexpr):
    """Cutoff, log-sum-exp and 1 / Σ p of the rows at stats_ptr; a row that is not there gets probabilities 0."""
    o_n = tl.arange(0, m_n.shape[0])
    b_max = tl.load(stats_ptr + o_n, mask=m_n, other=0.0)
    b_lse = tl.load(stats_ptr + plane + o_n, mask=m_n, other=-UNREADABLE)
    b_norm = tl.load(stats_ptr + 2 * plane + o_n, mask=m_n, other=0.0)
    return cutoff(b_max, b_lse, n_b, log_threshold, SLACK), b_lse, b_norm


@triton.jit
def load_row_gradients(
    message_ptr, dm_ptr, stride_mn, stride_me, entropy_ptr, dh_ptr, stride_hn, m_n, E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """δ = dm·m, dH and H of the rows at these pointers; message and entropy are contiguous, their gradients strided."""
    o_n = tl.arange(0, m_n.shape[0])
    b_entropy = tl.load(entropy_ptr + o_n, mask=m_n, other=0.0)
    b_dh = tl.load(dh_ptr + o_n * stride_hn, mask=m_n, other=0.0)
    b_delta = tl.zeros_like(b_dh)
    for first in range(0, E, BLOCK):
        b_message = load_tile(message_ptr, E, 1, m_n, first, E, BLOCK, tl.float32)
        b_dm = load_tile(dm_ptr, stride_mn, stride_me, m_n, first, E, BLOCK, tl.float32)
        b_delta += tl.sum(b_message * b_dm, 1)
    return b_delta, b_dh, b_entropy


@triton.jit
def score_gradients(b_z, b_da, b_cutoff, b_lse, b_norm, b_delta, b_dh, b_entropy, THRESHOLDED: tl.constexpr):
    """dz = a (da - δ) - dH p (log p + H), a = p / Σ p on the support and 0 off it."""
    b_log = b_z - b_lse[:, None]
    b_g = b_da - b_delta[:, None]
    if THRESHOLDED:
        b_g = tl.where(b_z >= b_cutoff[:, None], b_g * b_norm[:, None], 0.0)
    return tl.exp(b_log) * (b_g - b_dh[:, None] * (b_log + b_entropy[:, None]))


@triton.jit
def sparse_attention_stream_query_bwd_kernel(
    query_ptr,  # [B, N, D], strided
    keys_ptr,  # [heads, K, S, D]
    values_ptr,  # [heads, K, S, E]
    bias_ptr,  # [heads, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    totals_ptr,  # i32 [B]
    message_ptr,  # [heads, B, N, E]
    entropy_ptr,  # f32 [heads, B, N]
    stats_ptr,  # f32 [3, heads, B, N]
    d_message_ptr,  # [B, N, E], strided
    d_entropy_ptr,  # f32 [B, N], strided
    d_query_ptr,  # [heads, B, N, D]
    stride_qb, stride_qn, stride_qd, stride_mb, stride_mn, stride_me, stride_hb, stride_hn,
    scale, log_threshold, row_limit, B, N, K, S, num_channels, num_outputs,
    D: tl.constexpr, E: tl.constexpr, THRESHOLDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """BLOCK_T channels of the gradient of a block of pixels of one image under one head."""
    NUM_TILES: tl.constexpr = (D + BLOCK_T - 1) // BLOCK_T
    i_n, i_b, num_heads = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1), tl.num_programs(2) // NUM_TILES
    i_h, i_d = (tl.program_id(2) // NUM_TILES).to(tl.int64), tl.program_id(2) % NUM_TILES
    n_b = tl.load(totals_ptr + i_b)
    if n_b <= row_limit:
        return
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < N
    i_row = (i_h * B + i_b) * N + i_n
    q_ptr = query_ptr + tl.cast(i_b, tl.int64) * stride_qb + i_n * stride_qn
    dm_ptr = d_message_ptr + tl.cast(i_b, tl.int64) * stride_mb + i_n * stride_mn
    dh_ptr = d_entropy_ptr + tl.cast(i_b, tl.int64) * stride_hb + i_n * stride_hn
    plane = num_heads.to(tl.int64) * B * N
    b_cutoff, b_lse, b_norm = load_statistics(stats_ptr + i_row, plane, m_n, n_b, log_threshold, SLACK)
    b_delta, b_dh, b_entropy = load_row_gradients(
        message_ptr + i_row * E, dm_ptr, stride_mn, stride_me, entropy_ptr + i_row, dh_ptr, stride_hn, m_n, E, BLOCK_E
    )

    b_dq = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i_k in range(0, K):
        num_slots = class_sizes(class_mask_ptr, counts_ptr, i_b, i_k, K, S)
        for first in range(0, num_slots, BLOCK_M):
            m_m = first + tl.arange(0, BLOCK_M) < num_slots
            i_m = (i_h * K + i_k) * S + first
            k_ptr, v_ptr = keys_ptr + i_m * D, values_ptr + i_m * E
            b_qk = row_products(
                q_ptr, stride_qn, stride_qd, m_n, k_ptr, m_m, num_channels, D, BLOCK_D, DTYPE, PRECISION
            )
            b_da = row_products(
                dm_ptr, stride_mn, stride_me, m_n, v_ptr, m_m, num_outputs, E, BLOCK_E, DTYPE, PRECISION
            )
            b_z = masked_scores(b_qk, bias_ptr, i_m, m_m, scale)
            b_dz = score_gradients(b_z, b_da, b_cutoff, b_lse, b_norm, b_delta, b_dh, b_entropy, THRESHOLDED)
            b_k = load_tile(k_ptr, D, 1, m_m, i_d * BLOCK_T, D, BLOCK_T, DTYPE)
            b_dq = tl.dot(b_dz.to(DTYPE), b_k, b_dq, input_precision=PRECISION)

    o_d = i_d * BLOCK_T + tl.arange(0, BLOCK_T)
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    dq_ptr = d_query_ptr + i_row * D + o_n[:, None] * D + o_d[None, :]
    tl.store(dq_ptr, (b_dq * scale).to(d_query_ptr.dtype.element_ty), mask=m_nd)


@triton.jit
def all_below(totals_ptr, B, limit):
    """Whether no image reads more than `limit` entries."""
    most = 0
    for i_b in range(0, B, BLOCK_IMAGES):
        o_b = i_b + tl.arange(0, BLOCK_IMAGES)
        most = tl.maximum(most, tl.max(tl.load(totals_ptr + o_b, mask=o_b < B, other=0), 0))
    return most <= limit


@triton.jit
def read_pixels(totals_ptr, class_mask_ptr, counts_ptr, i_b, i_k, row_limit, N, K, S):
    """Number of entries of an image and how many of its pixels read class i_k here: all or none."""
    n_b = tl.load(totals_ptr + i_b)
    reads = (n_b > row_limit) & (class_sizes(class_mask_ptr, counts_ptr, tl.cast(i_b, tl.int64), i_k, K, S) > 0)
    return n_b, tl.where(reads, N, 0)


@triton.jit
def sparse_attention_stream_keys_bwd_kernel(
    query_ptr,  # [B, N, D], strided
    keys_ptr,  # [heads, K, S, D]
    values_ptr,  # [heads, K, S, E]
    bias_ptr,  # [heads, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    totals_ptr,  # i32 [B]
    message_ptr,  # [heads, B, N, E]
    entropy_ptr,  # f32 [heads, B, N]
    stats_ptr,  # f32 [3, heads, B, N]
    d_message_ptr,  # [B, N, E], strided
    d_entropy_ptr,  # f32 [B, N], strided
    d_keys_ptr,  # [heads, K, S, D] or None, added to
    d_bias_ptr,  # [heads, K, S] or None, added to
    stride_qb, stride_qn, stride_qd, stride_mb, stride_mn, stride_me, stride_hb, stride_hn,
    scale, log_threshold, row_limit, B, N, K, S, num_channels, num_outputs,
    D: tl.constexpr, E: tl.constexpr, THRESHOLDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """BLOCK_T channels of the gradient of a block of one class's keys under one head, and that of their bias."""
    NUM_TILES: tl.constexpr = (D + BLOCK_T - 1) // BLOCK_T if d_keys_ptr is not None else 1
    i_m, i_k, num_heads = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.num_programs(2) // NUM_TILES
    i_h, i_d = (tl.program_id(2) // NUM_TILES).to(tl.int64), tl.program_id(2) % NUM_TILES
    num_slots = tl.minimum(tl.load(counts_ptr + i_k), S)
    if i_m >= num_slots:
        return
    if all_below(totals_ptr, B, row_limit):
        return
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    o_n, o_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_m = i_m + o_m < num_slots
    i_slot = (i_h * K + i_k) * S + i_m
    k_ptr, v_ptr = keys_ptr + i_slot * D, values_ptr + i_slot * E
    plane = num_heads.to(tl.int64) * B * N

    b_dk = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    b_dbias = tl.zeros((BLOCK_M,), tl.float32)
    for i_b in range(0, B):
        n_b, num_pixels = read_pixels(totals_ptr, class_mask_ptr, counts_ptr, i_b, i_k, row_limit, N, K, S)
        for first in range(0, num_pixels, BLOCK_N):
            m_n = first + o_n < N
            i_n = tl.cast(first, tl.int64)
            i_row = (i_h * B + i_b) * N + i_n
            q_ptr = query_ptr + tl.cast(i_b, tl.int64) * stride_qb + i_n * stride_qn
            dm_ptr = d_message_ptr + tl.cast(i_b, tl.int64) * stride_mb + i_n * stride_mn
            dh_ptr = d_entropy_ptr + tl.cast(i_b, tl.int64) * stride_hb + i_n * stride_hn
            b_cutoff, b_lse, b_norm = load_statistics(stats_ptr + i_row, plane, m_n, n_b, log_threshold, SLACK)
            b_delta, b_dh, b_entropy = load_row_gradients(
                message_ptr + i_row * E, dm_ptr, stride_mn, stride_me, entropy_ptr + i_row, dh_ptr, stride_hn, m_n,
                E, BLOCK_E,
            )  # fmt: skip
            b_qk = row_products(
                q_ptr, stride_qn, stride_qd, m_n, k_ptr, m_m, num_channels, D, BLOCK_D, DTYPE, PRECISION
            )
            b_da = row_products(
                dm_ptr, stride_mn, stride_me, m_n, v_ptr, m_m, num_outputs, E, BLOCK_E, DTYPE, PRECISION
            )
            b_z = masked_scores(b_qk, bias_ptr, i_slot, m_m, scale)
            b_dz = score_gradients(b_z, b_da, b_cutoff, b_lse, b_norm, b_delta, b_dh, b_entropy, THRESHOLDED)
            b_dbias += tl.sum(b_dz, 0)
            if d_keys_ptr is not None:
                b_q = load_tile(q_ptr, stride_qn, stride_qd, m_n, i_d * BLOCK_T, D, BLOCK_T, DTYPE)
                b_dk = tl.dot(tl.trans(b_dz.to(DTYPE)), b_q, b_dk, input_precision=PRECISION)

    if d_keys_ptr is not None:
        o_d = i_d * BLOCK_T + tl.arange(0, BLOCK_T)
        m_md = m_m[:, None] & (o_d < D)[None, :]
        dk_ptr = d_keys_ptr + i_slot * D + o_m[:, None] * D + o_d[None, :]
        b_dk = tl.load(dk_ptr, mask=m_md).to(tl.float32) + b_dk * scale
        tl.store(dk_ptr, b_dk.to(d_keys_ptr.dtype.element_ty), mask=m_md)
    if d_bias_ptr is not None:
        m_m = m_m & (i_d == 0)
        b_dbias += tl.load(d_bias_ptr + i_slot + o_m, mask=m_m).to(tl.float32)
        tl.store(d_bias_ptr + i_slot + o_m, b_dbias.to(d_bias_ptr.dtype.element_ty), mask=m_m)


@triton.jit
def sparse_attention_stream_values_bwd_kernel(
    query_ptr,  # [B, N, D], strided
    keys_ptr,  # [heads, K, S, D]
    bias_ptr,  # [heads, K, S] or None
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    totals_ptr,  # i32 [B]
    stats_ptr,  # f32 [3, heads, B, N]
    d_message_ptr,  # [B, N, E], strided
    d_values_ptr,  # [heads, K, S, E], added to
    stride_qb, stride_qn, stride_qd, stride_mb, stride_mn, stride_me,
    scale, log_threshold, row_limit, B, N, K, S, num_channels,
    D: tl.constexpr, E: tl.constexpr, THRESHOLDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
    SLACK: tl.constexpr,
):  # fmt: skip
    """BLOCK_T channels of the gradient of a block of one class's values under one head."""
    NUM_TILES: tl.constexpr = (E + BLOCK_T - 1) // BLOCK_T
    i_m, i_k, num_heads = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.num_programs(2) // NUM_TILES
    i_h, i_e = (tl.program_id(2) // NUM_TILES).to(tl.int64), tl.program_id(2) % NUM_TILES
    num_slots = tl.minimum(tl.load(counts_ptr + i_k), S)
    if i_m >= num_slots:
        return
    if all_below(totals_ptr, B, row_limit):
        return
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    o_n, o_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_m = i_m + o_m < num_slots
    i_slot = (i_h * K + i_k) * S + i_m
    plane = num_heads.to(tl.int64) * B * N

    b_dv = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    for i_b in range(0, B):
        n_b, num_pixels = read_pixels(totals_ptr, class_mask_ptr, counts_ptr, i_b, i_k, row_limit, N, K, S)
        for first in range(0, num_pixels, BLOCK_N):
            m_n = first + o_n < N
            i_n = tl.cast(first, tl.int64)
            q_ptr = query_ptr + tl.cast(i_b, tl.int64) * stride_qb + i_n * stride_qn
            dm_ptr = d_message_ptr + tl.cast(i_b, tl.int64) * stride_mb + i_n * stride_mn
            i_row = (i_h * B + i_b) * N + i_n
            b_cutoff, b_lse, b_norm = load_statistics(stats_ptr + i_row, plane, m_n, n_b, log_threshold, SLACK)
            b_qk = row_products(
                q_ptr, stride_qn, stride_qd, m_n, keys_ptr + i_slot * D, m_m, num_channels, D, BLOCK_D, DTYPE, PRECISION
            )
            b_z = masked_scores(b_qk, bias_ptr, i_slot, m_m, scale)
            b_a = tl.exp(b_z - b_lse[:, None])
            if THRESHOLDED:
                b_a = tl.where(b_z >= b_cutoff[:, None], b_a * b_norm[:, None], 0.0)
            b_dm = load_tile(dm_ptr, stride_mn, stride_me, m_n, i_e * BLOCK_T, E, BLOCK_T, DTYPE)
            b_dv = tl.dot(tl.trans(b_a.to(DTYPE)), b_dm, b_dv, input_precision=PRECISION)

    o_e = i_e * BLOCK_T + tl.arange(0, BLOCK_T)
    m_me = m_m[:, None] & (o_e < E)[None, :]
    dv_ptr = d_values_ptr + i_slot * E + o_m[:, None] * E + o_e[None, :]
    b_dv += tl.load(dv_ptr, mask=m_me).to(tl.float32)
    tl.store(dv_ptr, b_dv.to(d_values_ptr.dtype.element_ty), mask=m_me)


def streaming_backward(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, counts: Tensor, class_mask: Tensor,
    message: Tensor, entropy: Tensor, stats: Tensor, totals: Tensor, d_message: Tensor, d_entropy: Tensor, *,
    scale: float, threshold: float, row_limit: int,
    d_query: Tensor | None, d_keys: Tensor | None, d_values: Tensor | None, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """Gradients through the images that read more than row_limit entries; the arguments of `streaming_forward` and:

    Args:
        message, entropy, stats, totals: what `streaming_forward` wrote, per head.
        d_message, d_entropy: [B, N, E] and f32 [B, N], any strides; the gradient of the entropy summed over heads.
        d_query: [heads, B, N, D] or None, contiguous; the rows of these images are written.
        d_keys, d_values, d_bias: shaped like keys, values and bias, contiguous, or None; each number is added to once.
    """
    batch, pixels, channels = query.shape
    heads, classes, slots, out_channels = values.shape
    if batch * pixels == 0:
        return
    read = (query, keys, values, bias, counts, class_mask, totals, message, entropy, stats, d_message, d_entropy)
    numbers = (scale, log_threshold(threshold), row_limit, batch, pixels, classes, slots, channels)
    strides = (*query.stride(), *d_message.stride())
    constants = {
        "D": channels, "E": out_channels, "THRESHOLDED": threshold > 0, "PRECISION": precision(),
        "SLACK": slack(query.dtype),
    }  # fmt: skip
    if d_query is not None:
        launch = launch_config(
            "sparse_attention_stream_query_bwd_kernel", query, BLOCK_D=channels, BLOCK_E=out_channels, BLOCK_T=channels
        )
        grid = (triton.cdiv(pixels, launch["BLOCK_N"]), batch, heads * triton.cdiv(channels, launch["BLOCK_T"]))
        sparse_attention_stream_query_bwd_kernel[grid](
            *read, d_query, *strides, *d_entropy.stride(), *numbers, out_channels, **constants, **launch
        )
    if classes * slots == 0:
        return
    if d_keys is not None or d_bias is not None:
        launch = launch_config(
            "sparse_attention_stream_keys_bwd_kernel", query, BLOCK_D=channels, BLOCK_E=out_channels, BLOCK_T=channels
        )
        tiles = triton.cdiv(channels, launch["BLOCK_T"]) if d_keys is not None else 1
        sparse_attention_stream_keys_bwd_kernel[triton.cdiv(slots, launch["BLOCK_M"]), classes, heads * tiles](
            *read, d_keys, d_bias, *strides, *d_entropy.stride(), *numbers, out_channels, **constants, **launch
        )
    if d_values is not None:
        launch = launch_config(
            "sparse_attention_stream_values_bwd_kernel", query, BLOCK_D=channels, BLOCK_T=out_channels
        )
        tiles = triton.cdiv(out_channels, launch["BLOCK_T"])
        sparse_attention_stream_values_bwd_kernel[triton.cdiv(slots, launch["BLOCK_M"]), classes, heads * tiles](
            query, keys, bias, counts, class_mask, totals, stats, d_message, d_values, *strides, *numbers,
            **constants, **launch,
        )  # fmt: skip
