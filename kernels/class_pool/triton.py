"""The pooling in Triton: one launch under `paper`, two under `authors`, one for the gradient.

Each program of the forward pass pools a strip of channels of one image: it finds the image's own classes in
`class_mask`, then reads its strip once, 16 classes at a time (an image with more reads it again). With so few rows
the pass is memory-bound, which leaves room for accurate weights: 16-bit features meet each weight as the sum of two
numbers of their type, `w = high + low`, in two products on the tensor cores with fp32 sums. Only fp16 needs care for
range: its weights travel times 2¹⁰, so that low parts stay above the subnormals; weights to 63 fit, probabilities
reach 1. fp32 features take IEEE products (tf32 where PyTorch allows it).

Under `authors` a launch before finds, for each pixel, the class with the largest score and that score; a pixel then
counts for one class only, and both passes read two maps instead of the logits of all classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .reference import EPSILON

ROWS = 16  # classes pooled in one pass over the features: the fewest rows of tl.dot
SCALE = {torch.float16: 1024.0}  # of the weights in a product; see the module's docstring


@triton.jit
def _positions(class_mask, i_b, K, BLOCK_K: tl.constexpr):
    """Position of each class in the order "own classes first, ascending", and the number of own classes."""
    o_k = tl.arange(0, BLOCK_K)
    b_own = tl.load(class_mask + i_b * K + o_k, mask=o_k < K, other=0).to(tl.int32)
    b_rank = tl.cumsum(b_own, 0)
    num_own = tl.sum(b_own)
    return tl.where(b_own > 0, b_rank - 1, num_own + o_k - b_rank), num_own


@triton.jit
def _classes(b_position, o_r, BLOCK_K: tl.constexpr):
    """The classes at positions `o_r`."""
    o_k = tl.arange(0, BLOCK_K)
    return tl.sum(tl.where(b_position[None, :] == o_r[:, None], o_k[None, :], 0), 1)


@triton.jit
def _weights(
    confidence,  # [K, N] of one image, strides stride_ck, stride_cn
    winners,  # [N] of the image, read only with AUTHORS
    b_class, o_n, mask, threshold, stride_ck, stride_cn, AUTHORS: tl.constexpr,
):  # fmt: skip
    """w of E5, fp32 [ROWS, BLOCK_N], 0 off `mask`."""
    p_weight = confidence + b_class.to(tl.int64)[:, None] * stride_ck + o_n.to(tl.int64)[None, :] * stride_cn
    b_weight = tl.load(p_weight, mask=mask, other=0.0).to(tl.float32)
    b_weight = tl.where(b_weight > threshold, b_weight, 0.0)
    if AUTHORS:
        b_winner = tl.load(winners + o_n[None, :], mask=mask, other=-1)
        b_weight = tl.where(b_winner == b_class[:, None], b_weight, 0.0)
    return b_weight


@triton.jit
def class_pool_fwd_winners_kernel(
    confidence,  # [B, K, N]: logits
    class_mask,  # [B, K]
    scores,  # [B, N]: relu(logit) over its spatial maximum, the largest of the image's classes
    winners,  # [B, N]: the lowest class that has it
    N, K, stride_cb, stride_ck, stride_cn, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Score and winner of a block of pixels of image i_b.

    Every program finds the spatial maxima of the image's own classes anew, N²/BLOCK_N reads in all, which the cache
    answers: that is less than a launch of their own. Division is correctly rounded, as the reference's is: a tie is
    broken by class, and rounded otherwise equal scores would differ.
    """
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_position, num_own = _positions(class_mask, i_b, K, BLOCK_K)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_score = tl.zeros([BLOCK_N], tl.float32)
    b_winner = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, num_own, ROWS):
        o_r = first + tl.arange(0, ROWS)
        m_r = (o_r < num_own)[:, None]
        b_class = _classes(b_position, o_r, BLOCK_K)
        p_class = confidence + i_b * stride_cb + b_class.to(tl.int64)[:, None] * stride_ck
        b_peak = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for n in range(0, N, BLOCK_N):
            o_p = n + tl.arange(0, BLOCK_N)
            p_logit = p_class + o_p.to(tl.int64)[None, :] * stride_cn
            b_logit = tl.load(p_logit, mask=m_r & (o_p < N)[None, :], other=0.0)
            b_peak = tl.maximum(b_peak, b_logit.to(tl.float32))
        b_norm = tl.maximum(tl.max(b_peak, 1), EPS)[:, None]
        p_logit = p_class + o_n.to(tl.int64)[None, :] * stride_cn
        b_logit = tl.load(p_logit, mask=m_r & (o_n < N)[None, :], other=0.0).to(tl.float32)
        b_own = tl.div_rn(tl.maximum(b_logit, 0.0), b_norm + tl.zeros_like(b_logit))
        b_best = tl.max(b_own, 0)
        b_first = tl.min(tl.where((b_own == b_best[None, :]) & m_r, b_class[:, None], K), 0)
        b_winner = tl.where(b_best > b_score, b_first, b_winner)  # a tie stays with the lower class
        b_score = tl.maximum(b_score, b_best)
    tl.store(scores + i_b * N + o_n, b_score, mask=o_n < N)
    tl.store(winners + i_b * N + o_n, b_winner, mask=o_n < N)


@triton.jit
def class_pool_fwd_kernel(
    features,  # [B, D, N]
    confidence,  # [B, K, N]; with winners: their scores, the same for every class
    winners,  # [B, N], read only with AUTHORS
    class_mask,  # [B, K]
    contexts,  # [B, K, D]
    weight_sums,  # [B, K]
    valid,  # [B, K]
    threshold, N, K, D, stride_fb, stride_fd, stride_fn, stride_cb, stride_ck, stride_cn, AUTHORS: tl.constexpr,
    EPS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A strip of channels of image i_b, pooled.

    The loop over classes runs to K, in the order "own classes first", so that absent ones get their zeros; the loop
    over pixels is empty for them.
    """
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    b_position, num_own = _positions(class_mask, i_b, K, BLOCK_K)
    p_features = features + i_b * stride_fb + o_d.to(tl.int64)[None, :] * stride_fd
    confidence += i_b * stride_cb
    if AUTHORS:
        winners += i_b * N
    for first in range(0, K, ROWS):
        o_r = first + tl.arange(0, ROWS)
        m_r = (o_r < num_own)[:, None]
        b_class = _classes(b_position, o_r, BLOCK_K)
        b_sum = tl.zeros([ROWS, BLOCK_N], tl.float32)
        b_context = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for n in range(0, tl.where(first < num_own, N, 0), BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            p_feature = p_features + o_n.to(tl.int64)[:, None] * stride_fn
            b_feature = tl.load(p_feature, mask=m_n[:, None] & m_d, other=0.0)
            b_weight = _weights(
                confidence, winners, b_class, o_n, m_r & m_n[None, :], threshold, stride_ck, stride_cn, AUTHORS
            )
            b_sum += b_weight
            b_weight *= SCALE
            b_high = b_weight.to(b_feature.dtype)
            b_context = tl.dot(b_high, b_feature, b_context, input_precision=PRECISION)
            if b_feature.dtype != tl.float32:
                b_low = (b_weight - b_high.to(tl.float32)).to(b_feature.dtype)
                b_context = tl.dot(b_low, b_feature, b_context)
        b_total = tl.sum(b_sum, 1)
        b_valid = b_total > (1.0 if AUTHORS else 0.0)
        b_norm = tl.where(b_valid, b_total + EPS if AUTHORS else b_total, 1.0) * SCALE
        b_context = tl.where(b_valid[:, None], b_context / b_norm[:, None], 0.0)
        o_out = i_b * K + b_class
        m_out = o_r < K
        tl.store(contexts + o_out[:, None] * D + o_d[None, :], b_context, mask=m_out[:, None] & m_d)
        if i_d == 0:
            tl.store(weight_sums + o_out, b_total, mask=m_out)
            tl.store(valid + o_out, b_valid, mask=m_out)


@triton.jit
def class_pool_bwd_kernel(
    grad_contexts,  # [B, K, D]
    confidence,  # [B, K, N]; with winners: their scores, the same for every class
    winners,  # [B, N], read only with AUTHORS
    class_mask,  # [B, K]
    weight_sums,  # [B, K]
    grad_features,  # [B, D, N]
    threshold, N, K, D, stride_gb, stride_gk, stride_gd, stride_cb, stride_ck, stride_cn, stride_fb, stride_fd,
    stride_fn, AUTHORS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of pixels and channels of image i_b: df_j = Σ_k (w_kj / Σ w_k) dc_k, its own classes alone."""
    i_n, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, (o_d < D)[None, :]
    b_position, num_own = _positions(class_mask, i_b, K, BLOCK_K)
    p_context = grad_contexts + i_b * stride_gb + o_d.to(tl.int64)[None, :] * stride_gd
    confidence += i_b * stride_cb
    if AUTHORS:
        winners += i_b * N
    b_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, num_own, ROWS):
        o_r = first + tl.arange(0, ROWS)
        b_class = _classes(b_position, o_r, BLOCK_K)
        b_total = tl.load(weight_sums + i_b * K + b_class, mask=o_r < num_own, other=0.0)
        m_r = b_total > (1.0 if AUTHORS else 0.0)
        b_norm = tl.where(m_r, b_total + EPS if AUTHORS else b_total, 1.0)
        m_weight = m_r[:, None] & m_n[None, :]
        b_weight = _weights(confidence, winners, b_class, o_n, m_weight, threshold, stride_ck, stride_cn, AUTHORS)
        b_share = b_weight / b_norm[:, None]
        p_row = p_context + b_class.to(tl.int64)[:, None] * stride_gk
        b_context = tl.load(p_row, mask=m_r[:, None] & m_d, other=0.0).to(tl.float32)
        b_grad = tl.dot(tl.trans(b_share), b_context, b_grad, input_precision=PRECISION)
    p_grad = grad_features + i_b * stride_fb + o_n.to(tl.int64)[:, None] * stride_fn
    p_grad += o_d.to(tl.int64)[None, :] * stride_fd
    tl.store(p_grad, b_grad, mask=m_n[:, None] & m_d)


def class_pool(
    features: Tensor, confidence: Tensor, class_mask: Tensor, *, threshold: float, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mcic.kernels.class_pool`."""
    confidence, winners = confidence.detach(), None
    if rule == "authors":
        scores, winners = torch.ops.mcic.class_pool_winners(confidence, class_mask)
        confidence = scores[:, None].expand(-1, class_mask.shape[1], -1, -1)
    return torch.ops.mcic.class_pool(features, confidence, winners, class_mask, threshold)


@torch.library.custom_op("mcic::class_pool_winners", mutates_args=())
def _winners(confidence: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score and class, each [B, H, W], of the class with the largest normalised score of each pixel."""
    batch, num_classes, height, width = confidence.shape
    scores = confidence.new_empty(batch, height, width, dtype=torch.float32)
    winners = torch.empty_like(scores, dtype=torch.int32)
    pixels = confidence.flatten(2)
    launch = config("class_pool_fwd_winners_kernel", confidence.device, confidence.dtype)
    grid = (triton.cdiv(height * width, launch["BLOCK_N"]), batch)
    with torch.cuda.device_of(confidence):
        class_pool_fwd_winners_kernel[grid](
            pixels,
            class_mask.contiguous(),
            scores,
            winners,
            height * width,
            num_classes,
            *pixels.stride(),
            EPS=EPSILON,
            ROWS=ROWS,
            BLOCK_K=_power_of_two(num_classes),
            **launch,
        )
    return scores, winners


@_winners.register_fake
def _(confidence: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, height, width = confidence.shape
    scores = confidence.new_empty(batch, height, width, dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int32)


@torch.library.custom_op("mcic::class_pool", mutates_args=())
def _pool(
    features: Tensor, confidence: Tensor, winners: Tensor | None, class_mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, weight sums and validity; with `winners`, of the rule `authors`: the confidence is their scores."""
    contexts, weight_sums, valid = _outputs(features, class_mask)
    flat, pixels = features.flatten(2), confidence.flatten(2)
    num_classes, channels, num_pixels = class_mask.shape[1], *flat.shape[1:]
    launch = config("class_pool_fwd_kernel", features.device, features.dtype)
    grid = (max(1, triton.cdiv(channels, launch["BLOCK_D"])), features.shape[0])
    with torch.cuda.device_of(features):
        class_pool_fwd_kernel[grid](
            flat,
            pixels,
            winners,
            class_mask.contiguous(),
            contexts,
            weight_sums,
            valid,
            threshold,
            num_pixels,
            num_classes,
            channels,
            *flat.stride(),
            *pixels.stride(),
            AUTHORS=winners is not None,
            EPS=EPSILON,
            SCALE=SCALE.get(features.dtype, 1.0),
            PRECISION=_precision(),
            ROWS=ROWS,
            BLOCK_K=_power_of_two(num_classes),
            **launch,
        )
    return contexts, weight_sums, valid


@_pool.register_fake
def _(
    features: Tensor, confidence: Tensor, winners: Tensor | None, class_mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(features, class_mask)


def _outputs(features: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    contexts = features.new_empty(*class_mask.shape, features.shape[1], dtype=torch.float32)
    weight_sums = features.new_empty(class_mask.shape, dtype=torch.float32)
    return contexts, weight_sums, torch.empty_like(weight_sums, dtype=torch.bool)


@torch.library.custom_op("mcic::class_pool_backward", mutates_args=())
def _pool_backward(
    grad_contexts: Tensor,
    confidence: Tensor,
    winners: Tensor | None,
    class_mask: Tensor,
    weight_sums: Tensor,
    threshold: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [B, D, H, W] of the features, in their dtype and memory format."""
    grad_features = _like_features(grad_contexts, confidence, channels_last, dtype)
    flat, pixels = grad_features.flatten(2), confidence.flatten(2)
    num_images, channels, num_pixels = flat.shape
    launch = config("class_pool_bwd_kernel", flat.device, dtype)
    grid = (triton.cdiv(num_pixels, launch["BLOCK_N"]), triton.cdiv(channels, launch["BLOCK_D"]), num_images)
    with torch.cuda.device_of(flat):
        class_pool_bwd_kernel[grid](
            grad_contexts,
            pixels,
            winners,
            class_mask.contiguous(),
            weight_sums,
            flat,
            threshold,
            num_pixels,
            class_mask.shape[1],
            channels,
            *grad_contexts.stride(),
            *pixels.stride(),
            *flat.stride(),
            AUTHORS=winners is not None,
            EPS=EPSILON,
            PRECISION=_precision() if dtype == torch.float32 else "tf32x3",
            ROWS=ROWS,
            BLOCK_K=_power_of_two(class_mask.shape[1]),
            **launch,
        )
    return grad_features


@_pool_backward.register_fake
def _(
    grad_contexts: Tensor,
    confidence: Tensor,
    winners: Tensor | None,
    class_mask: Tensor,
    weight_sums: Tensor,
    threshold: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    return _like_features(grad_contexts, confidence, channels_last, dtype)


def _like_features(grad_contexts: Tensor, confidence: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    batch, _, height, width = confidence.shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (batch, grad_contexts.shape[2], height, width)
    return torch.empty(size, dtype=dtype, device=grad_contexts.device, memory_format=memory_format)


def _save(ctx, inputs: Sequence, output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, confidence, winners, class_mask, threshold = inputs
    _, weight_sums, valid = output
    ctx.mark_non_differentiable(weight_sums, valid)
    ctx.save_for_backward(confidence, winners, class_mask, weight_sums)
    ctx.arguments = threshold, features.stride(1) == 1, features.dtype


def _backward(ctx, grad_contexts: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return torch.ops.mcic.class_pool_backward(grad_contexts, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


_pool.register_autograd(_backward, setup_context=_save)


def _power_of_two(num_classes: int) -> int:
    """Block that holds all classes."""
    return max(16, triton.next_power_of_2(num_classes))


def _precision() -> str:
    """Of products of fp32 blocks, as PyTorch is set."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
