"""Gradients of the images with few entries, from the attention that the forward pass kept.

Three launches: the gradient dz of the scores (and dq, while dz is on the chip); per image, the sums over its pixels
that give its entries' part of dk, dv and dbias; and the sum of these parts over the images that read a row. Every
sum runs in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .entries import entry_rows, num_entries
from .rows import BLOCK_K, STEPS, row_mask, row_products, store_combination, store_zeros

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _log2(b_x):
    """The hardware's approximation: within 2^-22 between 0.5 and 2, elsewhere within 2^-22 of the value. The library's
    takes ten times the registers."""
    if INTERPRETED:
        return tl.log2(b_x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _load_beside(attention_ptr, b_da, o_n, o_j, N, n, R, CACHE: tl.constexpr):
    """The row block of a that belongs to `b_da`, fp32, in the layout of `b_da`.

    `b_da` lies in registers as the tensor cores leave it, what is loaded as a coalesced load has it, and an operation
    on both needs one layout. Left alone, the compiler moves the fp32 products to the other, through shared memory. The
    `mov` ties a to `b_da`, which it never reads: so it is the 16-bit values of a that move.

    a is needed twice. Loads whose cache modifiers differ are not merged into one, whose values would stay in registers
    in between.
    """
    p_a = attention_ptr + (tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * R + o_j[None, :])
    b_a = tl.load(p_a, mask=row_mask(o_j, n)[None, :], other=0.0, cache_modifier=CACHE).to(tl.float32)
    if INTERPRETED:
        return b_a
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [b_a, b_da], tl.float32, is_pure=True, pack=1)


@triton.jit
def _weighted_mean(b_da, attention_ptr, o_n, o_j, N, n, R):
    """Σ_j a_j da_j over a block of the row."""
    b_a = _load_beside(attention_ptr, b_da, o_n, o_j, N, n, R, "")
    return tl.sum(tl.where(b_a < 0, 0.0, b_a) * b_da, 1)


@triton.jit
def _differentiate_scores(
    b_da, b_mean, attention_ptr, inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, o_n, o_j, N, n, R
):
    """dz = a (da - Σ a da) - dH p (log p + H), written where wanted; p = |a| · Σ_kept p."""
    m_n = o_n < N
    b_a = _load_beside(attention_ptr, b_da, o_n, o_j, N, n, R, ".cg")
    b_dz = tl.where(b_a < 0, 0.0, b_a) * (b_da - b_mean[:, None])
    if d_entropy_ptr is not None:
        b_kept = 1.0 / tl.load(inverse_ptr + o_n, mask=m_n, other=1.0)
        b_dh = tl.load(d_entropy_ptr + o_n, mask=m_n, other=0.0) * b_kept
        b_shift = b_dh * (tl.load(entropy_ptr + o_n, mask=m_n, other=0.0) + tl.log(b_kept))
        b_dh *= 0.6931471805599453
        b_a = tl.abs(b_a)
        b_dz -= b_a * (b_shift[:, None] + b_dh[:, None] * _log2(tl.maximum(b_a, 1e-30)))
    b_dz = b_dz.to(attention_ptr.dtype.element_ty)
    if d_scores_ptr is not None:
        p_dz = d_scores_ptr + (o_n.to(tl.int64)[:, None] * R + o_j[None, :])
        tl.store(p_dz, b_dz, mask=m_n[:, None] & row_mask(o_j, n)[None, :])
    return b_dz


@triton.jit
def _scores_block(
    d_message_ptr, stride_mn, stride_me, keys_ptr, values_ptr, counts_ptr, class_mask_ptr,
    attention_ptr, inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, d_query_ptr,
    scale, i_b, o_n, N, D, E, K, S, R,
    W0: tl.constexpr, W1: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pixels `o_n` of image `i_b`, which reads 1 … W0 + W1 entries; pointers stand at the image and head."""
    dtype: tl.constexpr = attention_ptr.dtype.element_ty
    m_n = o_n < N
    o_0 = tl.arange(0, W0)
    o_1 = W0 + tl.arange(0, max(W1, 1))
    b_rows0, n = entry_rows(class_mask_ptr, counts_ptr, i_b, o_0, K, S, BLOCK_K)
    b_rows1, n = entry_rows(class_mask_ptr, counts_ptr, i_b, o_1, K, S, BLOCK_K)
    m_0, m_1 = o_0 < n, o_1 < n
    b_da0, b_da1 = row_products(
        d_message_ptr, stride_mn, stride_me, values_ptr, b_rows0, b_rows1, m_0, m_1, o_n, N, E,
        dtype, W1, BLOCK_E, PRECISION,
    )  # fmt: skip
    b_mean = _weighted_mean(b_da0, attention_ptr, o_n, o_0, N, n, R)
    b_mean += _weighted_mean(b_da1, attention_ptr, o_n, o_1, N, n, R)
    b_dz0 = _differentiate_scores(
        b_da0, b_mean, attention_ptr, inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, o_n, o_0, N, n, R
    )
    b_dz1 = b_dz0
    if W1 > 0:
        b_dz1 = _differentiate_scores(
            b_da1, b_mean, attention_ptr, inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, o_n, o_1, N, n, R
        )
    if d_query_ptr is not None:
        store_combination(
            d_query_ptr, keys_ptr, b_dz0, b_dz1, b_rows0, b_rows1, m_0, m_1, o_n, m_n, scale, D, W1, BLOCK_D, PRECISION
        )


@triton.jit
def sparse_attention_rows_bwd_scores_kernel(
    d_message_ptr,  # [B, N, E], any strides
    keys_ptr,  # [h, K, S, D]
    values_ptr,  # [h, K, S, E]
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    attention_ptr,  # [h, B, N, R]
    inverse_ptr,  # f32 [h, B, N]
    entropy_ptr,  # f32 [h, B, N]
    d_entropy_ptr,  # f32 [B, N] or None
    d_scores_ptr,  # out [h, B, N, R] or None
    d_query_ptr,  # out [h, B, N, D] or None
    stride_mb, stride_mn, stride_me, scale, N, D, E, K, S, R,
    STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz and dq of one block of pixels, like the forward kernel."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)
    i_head = i_h.to(tl.int64)
    i_pixels = (i_head * tl.num_programs(1) + i_b) * N  # first pixel of the image in [h, B, N]
    d_message_ptr += i_b.to(tl.int64) * stride_mb
    keys_ptr += i_head * K * S * D
    values_ptr += i_head * K * S * E
    attention_ptr += i_pixels * R
    inverse_ptr += i_pixels
    entropy_ptr += i_pixels
    if d_entropy_ptr is not None:
        d_entropy_ptr += i_b.to(tl.int64) * N
    if d_scores_ptr is not None:
        d_scores_ptr += i_pixels * R
    if d_query_ptr is not None:
        d_query_ptr += i_pixels * D
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if n == 0:
        if d_query_ptr is not None:
            store_zeros(d_query_ptr, o_n, o_n < N, D, BLOCK_D)
    elif n <= STEP:
        _scores_block(
            d_message_ptr, stride_mn, stride_me, keys_ptr, values_ptr, counts_ptr, class_mask_ptr, attention_ptr,
            inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, d_query_ptr, scale,
            i_b, o_n, N, D, E, K, S, R, STEP, 0, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif n <= STEP + STEP // 2:
        _scores_block(
            d_message_ptr, stride_mn, stride_me, keys_ptr, values_ptr, counts_ptr, class_mask_ptr, attention_ptr,
            inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, d_query_ptr, scale,
            i_b, o_n, N, D, E, K, S, R, STEP, STEP // 2, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif n <= 2 * STEP:  # half the pixels at a time: their rows fill the registers
        for i_half in range(2):
            o_half = i_n * BLOCK_N + i_half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            _scores_block(
                d_message_ptr, stride_mn, stride_me, keys_ptr, values_ptr, counts_ptr, class_mask_ptr, attention_ptr,
                inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, d_query_ptr, scale,
                i_b, o_half, N, D, E, K, S, R, STEP, STEP, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip
    elif n <= STEPS * STEP:
        for i_quarter in range(4):
            o_quarter = i_n * BLOCK_N + i_quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            _scores_block(
                d_message_ptr, stride_mn, stride_me, keys_ptr, values_ptr, counts_ptr, class_mask_ptr, attention_ptr,
                inverse_ptr, entropy_ptr, d_entropy_ptr, d_scores_ptr, d_query_ptr, scale,
                i_b, o_quarter, N, D, E, K, S, R, 2 * STEP, 2 * STEP, BLOCK_D, BLOCK_E, BLOCK_K, PRECISION,
            )  # fmt: skip


@triton.jit
def _load_weights(weight_ptr, o_n, o_j, N, n, R, RECTIFY: tl.constexpr):
    """[pixels, entries] of dz, or of the attention over the kept entries; 0 beyond the last pixel."""
    p_row = weight_ptr + (o_n.to(tl.int64)[:, None] * R + o_j[None, :])
    b_w = tl.load(p_row, mask=(o_n < N)[:, None] & row_mask(o_j, n)[None, :], other=0.0)
    if RECTIFY:
        b_w = tl.where(b_w < 0, 0.0, b_w).to(b_w.dtype)
    return b_w


@triton.jit
def _pixel_sums(
    parts_ptr, weight_ptr, x_ptr, stride_n, stride_c, factor, i_j, o_c, N, C, n, R,
    RECTIFY: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[j, c] = factor · Σ_i weight_ij x_ic of the entries i_j … i_j + W0 + W1 - 1."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    o_0 = i_j + tl.arange(0, W0)
    o_1 = i_j + W0 + tl.arange(0, max(W1, 1))
    m_c = o_c < C
    b_0 = tl.zeros([o_0.shape[0], o_c.shape[0]], tl.float32)
    b_1 = tl.zeros([o_1.shape[0], o_c.shape[0]], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_n + o_c[None, :] * stride_c
        b_x = tl.load(p_x, mask=(o_n < N)[:, None] & m_c[None, :], other=0.0).to(dtype)
        b_w = _load_weights(weight_ptr, o_n, o_0, N, n, R, RECTIFY)
        b_0 = tl.dot(tl.trans(b_w), b_x, b_0, input_precision=PRECISION)
        if W1 > 0:
            b_w = _load_weights(weight_ptr, o_n, o_1, N, n, R, RECTIFY)
            b_1 = tl.dot(tl.trans(b_w), b_x, b_1, input_precision=PRECISION)
    p_parts = parts_ptr + (o_0[:, None] * C + o_c[None, :])
    tl.store(p_parts, b_0 * factor, mask=(o_0 < n)[:, None] & m_c[None, :])
    if W1 > 0:
        p_parts = parts_ptr + (o_1[:, None] * C + o_c[None, :])
        tl.store(p_parts, b_1 * factor, mask=(o_1 < n)[:, None] & m_c[None, :])


@triton.jit
def _partial_tile(
    parts_ptr, weight_ptr, x_ptr, stride_n, stride_c, factor, i_c, N, C, n, R,
    RECTIFY: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    if n <= STEP:
        _pixel_sums(
            parts_ptr, weight_ptr, x_ptr, stride_n, stride_c, factor, 0, o_c, N, C, n, R,
            RECTIFY, STEP, 0, BLOCK_N, PRECISION,
        )  # fmt: skip
    elif n <= STEP + STEP // 2:
        _pixel_sums(
            parts_ptr, weight_ptr, x_ptr, stride_n, stride_c, factor, 0, o_c, N, C, n, R,
            RECTIFY, STEP, STEP // 2, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        for i_j in range(0, n, 2 * STEP):
            _pixel_sums(
                parts_ptr, weight_ptr, x_ptr, stride_n, stride_c, factor, i_j, o_c, N, C, n, R,
                RECTIFY, STEP, STEP, BLOCK_N, PRECISION,
            )  # fmt: skip


@triton.jit
def _bias_tile(parts_ptr, d_scores_ptr, N, n, R, STEP: tl.constexpr, BLOCK_N: tl.constexpr):
    for i_j in range(0, n, STEP):
        o_j = i_j + tl.arange(0, STEP)
        b_sum = tl.zeros([STEP], tl.float32)
        for i_n in range(0, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_sum += tl.sum(_load_weights(d_scores_ptr, o_n, o_j, N, n, R, False).to(tl.float32), 0)
        tl.store(parts_ptr + o_j, b_sum, mask=o_j < n)


@triton.jit
def sparse_attention_rows_bwd_partial_kernel(
    query_ptr,  # [B, N, D], any strides
    d_message_ptr,  # [B, N, E], any strides
    counts_ptr,  # i32 [K]
    class_mask_ptr,  # bool [B, K]
    attention_ptr,  # [h, B, N, R]
    d_scores_ptr,  # [h, B, N, R] or None
    key_parts_ptr,  # out f32 [h, B, R, D] or None
    value_parts_ptr,  # out f32 [h, B, R, E] or None
    bias_parts_ptr,  # out f32 [h, B, R] or None
    stride_qb, stride_qn, stride_qd, stride_mb, stride_mn, stride_me, scale, N, D, E, K, S, R,
    key_tiles, value_tiles,
    SPARSE: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of image i_b in head i_h: the key channels' tiles, then the values', then the bias."""
    i_t, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K)
    if n > STEPS * STEP:
        n = 0
    i_image = i_h.to(tl.int64) * tl.num_programs(1) + i_b
    if i_t < key_tiles:
        if key_parts_ptr is not None:
            _partial_tile(
                key_parts_ptr + i_image * R * D, d_scores_ptr + i_image * N * R,
                query_ptr + i_b.to(tl.int64) * stride_qb, stride_qn, stride_qd, scale, i_t, N, D, n, R,
                False, STEP, BLOCK_N, BLOCK_C, PRECISION,
            )  # fmt: skip
    elif i_t < key_tiles + value_tiles:
        if value_parts_ptr is not None:
            _partial_tile(
                value_parts_ptr + i_image * R * E, attention_ptr + i_image * N * R,
                d_message_ptr + i_b.to(tl.int64) * stride_mb, stride_mn, stride_me, 1.0, i_t - key_tiles, N, E, n, R,
                SPARSE, STEP, BLOCK_N, BLOCK_C, PRECISION,
            )  # fmt: skip
    elif bias_parts_ptr is not None:
        _bias_tile(bias_parts_ptr + i_image * R, d_scores_ptr + i_image * N * R, N, n, R, STEP, BLOCK_N)


@triton.jit
def _sum_images(
    out_ptr, parts_ptr, starts_ptr, i_k, o_s, m_s, o_c, B, K, S, R, C,
):  # fmt: skip
    """out[i_k, s, c] = Σ_b parts[b, start of class i_k in image b + s, c], image after image."""
    m_c = o_c < C
    b_sum = tl.zeros([o_s.shape[0], o_c.shape[0]], tl.float32)
    for i_b in range(B):
        start = tl.load(starts_ptr + i_b * K + i_k)
        p_parts = parts_ptr + ((start + o_s)[:, None] * C + o_c[None, :])
        b_sum += tl.load(p_parts, mask=(m_s & (start >= 0))[:, None] & m_c[None, :], other=0.0)
        parts_ptr += R * C
    p_out = out_ptr + (i_k.to(tl.int64) * S + o_s)[:, None] * C + o_c[None, :]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=(o_s < S)[:, None] & m_c[None, :])


@triton.jit
def sparse_attention_rows_bwd_reduce_kernel(
    counts_ptr,  # i32 [K]
    starts_ptr,  # i32 [B, K]
    key_parts_ptr,  # f32 [h, B, R, D] or None
    value_parts_ptr,  # f32 [h, B, R, E] or None
    bias_parts_ptr,  # f32 [h, B, R] or None
    d_keys_ptr,  # out [h, K, S, D] or None
    d_values_ptr,  # out [h, K, S, E] or None
    d_bias_ptr,  # out [h, K, S] or None
    B, D, E, K, S, R, key_tiles, value_tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some slots of one class in head i_h: the parts of all images added up; 0 in rows that nobody reads."""
    i_t, i_h = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_blocks = tl.cdiv(S, BLOCK_S)
    i_k = tl.program_id(0) // num_blocks
    o_s = tl.program_id(0) % num_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < tl.minimum(tl.load(counts_ptr + i_k), S)
    o_c = tl.arange(0, BLOCK_C)
    if i_t < key_tiles:
        if key_parts_ptr is not None:
            o_c += i_t * BLOCK_C
            key_parts_ptr += i_h * B * R * D
            d_keys_ptr += i_h * K * S * D
            _sum_images(d_keys_ptr, key_parts_ptr, starts_ptr, i_k, o_s, m_s, o_c, B, K, S, R, D)
    elif i_t < key_tiles + value_tiles:
        if value_parts_ptr is not None:
            o_c += (i_t - key_tiles) * BLOCK_C
            value_parts_ptr += i_h * B * R * E
            d_values_ptr += i_h * K * S * E
            _sum_images(d_values_ptr, value_parts_ptr, starts_ptr, i_k, o_s, m_s, o_c, B, K, S, R, E)
    elif bias_parts_ptr is not None:
        bias_parts_ptr += i_h * B * R
        d_bias_ptr += i_h * K * S
        _sum_images(d_bias_ptr, bias_parts_ptr, starts_ptr, i_k, o_s, m_s, o_c, B, K, S, R, 1)


def rows_backward(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, class_mask: Tensor,
    entropy: Tensor, attention: Tensor, stats: Tensor, starts: Tensor,
    d_message: Tensor, d_entropy: Tensor | None, *,
    scale: float, threshold: float, precision: str,
    d_query: Tensor | None, d_keys: Tensor | None, d_values: Tensor | None, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients that are not None: d_query for the images with at most `row_limit` entries, the others whole.

    Args:
        query, keys, values, counts, class_mask, entropy, attention, stats, starts: of `rows_forward`.
        d_message: [B, N, E], any strides.
        d_entropy: f32 [B, N] contiguous, of each head's entropy, or None for 0.
        d_query: out [h, B, N, D]; the query's dtype, or fp32 where the heads are still to be summed.
        d_keys, d_values, d_bias: out [h, K, S, ·], any floating dtype.
    """
    batch, pixels, channels = query.shape
    heads, classes, slots, out = values.shape
    row = attention.shape[-1]
    sizes = (pixels, channels, out, classes, slots, row)
    step = config("sparse_attention_rows_fwd_kernel", query.device, query.dtype)["STEP"]
    wanted = [gradient is not None for gradient in (d_keys, d_values, d_bias)]
    d_scores = None
    if d_query is not None or d_keys is not None or d_bias is not None:
        settings = config("sparse_attention_rows_bwd_scores_kernel", query.device, query.dtype)
        d_scores = torch.empty_like(attention) if d_keys is not None or d_bias is not None else None
        sparse_attention_rows_bwd_scores_kernel[triton.cdiv(pixels, settings["BLOCK_N"]), batch, heads](
            d_message, keys, values, counts, class_mask, attention, stats[2], entropy, d_entropy, d_scores, d_query,
            *d_message.stride(), scale, *sizes, STEP=step, BLOCK_K=BLOCK_K, PRECISION=precision, **settings,
        )  # fmt: skip
    if not any(wanted):
        return

    key_parts, value_parts, bias_parts = (
        torch.empty((heads, batch, row, width), device=query.device) if want else None
        for width, want in zip((channels, out, 1), wanted, strict=True)
    )

    def tiles(block: int) -> list[int]:
        return [triton.cdiv(w, block) * want for w, want in zip((channels, out, 1), wanted, strict=True)]

    settings = config("sparse_attention_rows_bwd_partial_kernel", query.device, query.dtype)
    num = tiles(settings["BLOCK_C"])
    sparse_attention_rows_bwd_partial_kernel[sum(num), batch, heads](
        query, d_message, counts, class_mask, attention, d_scores, key_parts, value_parts, bias_parts,
        *query.stride(), *d_message.stride(), scale, *sizes, *num[:2],
        SPARSE=threshold > 0, STEP=step, BLOCK_K=BLOCK_K, PRECISION=precision, **settings,
    )  # fmt: skip
    settings = config("sparse_attention_rows_bwd_reduce_kernel", query.device, query.dtype)
    num = tiles(settings["BLOCK_C"])
    sparse_attention_rows_bwd_reduce_kernel[classes * triton.cdiv(slots, settings["BLOCK_S"]), sum(num), heads](
        counts, starts, key_parts, value_parts, bias_parts, d_keys, d_values, d_bias,
        batch, *sizes[1:], *num[:2], **settings,
    )  # fmt: skip
