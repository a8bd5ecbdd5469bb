"""The masks in one launch: a program makes all three for a tile of pixels of one image.

Grids of more than ONE_LAUNCH_PIXELS get the spatial maxima from a launch of their own: reading a whole map for each
tile is free while it lies in the cache, but grows with the square of the number of pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .reference import EPSILON, IGNORE

ONE_LAUNCH_PIXELS = 2**15

_EPSILON = tl.constexpr(EPSILON)
_IGNORE = tl.constexpr(IGNORE)


@triton.jit
def _peak(
    row_ptr,  # [N] of one class of one image, stride_n
    valid_ptr,  # u8 [N] of the image, or None
    N,
    stride_n,
    BLOCK_P: tl.constexpr,
):
    """Maximum of relu(heatmap) over the valid pixels."""
    b_peak = tl.zeros([BLOCK_P], tl.float32)
    for i_p in range(0, N, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_p = o_p < N
        b_h = tl.load(row_ptr + o_p.to(tl.int64) * stride_n, mask=m_p, other=0).to(tl.float32)
        if valid_ptr is not None:
            b_h = tl.where(tl.load(valid_ptr + o_p, mask=m_p, other=0) != 0, b_h, 0.0)
        b_peak = tl.maximum(b_peak, b_h)
    return tl.max(b_peak)


@triton.jit
def pseudo_masks_peak_kernel(
    heatmap_ptr,  # [B, L, N], strides stride_b, stride_l, stride_n
    tags_ptr,  # u8 [B, L]
    valid_ptr,  # u8 [B, N], or None
    peaks_ptr,  # f32 [B, L], written for the image's own classes
    N,
    L,
    stride_b,
    stride_l,
    stride_n,
    BLOCK_P: tl.constexpr,
):
    i_l, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(tags_ptr + i_b * L + i_l) != 0:
        row_ptr = heatmap_ptr + i_b * stride_b + i_l.to(tl.int64) * stride_l
        if valid_ptr is not None:
            valid_ptr += i_b * N
        tl.store(peaks_ptr + i_b * L + i_l, _peak(row_ptr, valid_ptr, N, stride_n, BLOCK_P))


@triton.jit
def _label(b_background, b_best, b_object, m_labelled, threshold):
    """The E3 rule from the background row, the best object's score and its class: background, row 0, wins ties."""
    b_label = tl.where(b_background >= b_best, 0, b_object)
    m_labelled = m_labelled & (tl.maximum(b_background, b_best) >= threshold)
    return tl.where(m_labelled, b_label, _IGNORE)


@triton.jit
def _cam_label(
    heatmap_ptr,  # [L, N] of the image, strides stride_l, stride_n
    tags_ptr,  # u8 [L] of the image
    valid_ptr,  # u8 [N] of the image, or None
    peaks_ptr,  # f32 [L] of the image, or None: found here
    b_saliency,  # [BLOCK_N], or None
    o_n,
    m_n,
    m_labelled,
    N,
    L,
    stride_l,
    stride_n,
    threshold,
    POWER: tl.constexpr,
    AUTHORS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """E2 and E3 for a tile."""
    b_best = tl.zeros_like(o_n).to(tl.float32)
    b_object = tl.zeros_like(o_n)
    for i_l in range(L):
        if tl.load(tags_ptr + i_l) != 0:
            row_ptr = heatmap_ptr + tl.cast(i_l, tl.int64) * stride_l
            peak = _peak(row_ptr, valid_ptr, N, stride_n, BLOCK_P) if peaks_ptr is None else tl.load(peaks_ptr + i_l)
            peak = tl.maximum(peak, _EPSILON) if AUTHORS else peak + _EPSILON
            b_h = tl.load(row_ptr + o_n.to(tl.int64) * stride_n, mask=m_n, other=0).to(tl.float32)
            # Rounded as the reference rounds, so that equal scores stay equal and the lower class wins.
            b_h = tl.div_rn(tl.maximum(b_h, 0.0), tl.zeros_like(b_h) + peak)
            b_object = tl.where(b_h > b_best, i_l + 1, b_object)
            b_best = tl.maximum(b_best, b_h)
    if b_saliency is not None and AUTHORS:
        b_background = tl.where(b_saliency < threshold, 1.0, 0.0)
    else:
        b_background = tl.maximum(1.0 - (b_best if b_saliency is None else b_saliency), 0.0)
        if POWER == 0.0:
            b_background = tl.zeros_like(b_background) + 1.0
        elif POWER != 1.0:
            b_background = tl.exp2(POWER * tl.log2(b_background))
    return _label(b_background, b_best, b_object, m_labelled, threshold)


@triton.jit
def _context_label(
    logits_ptr,  # [K, N] of the image, strides stride_k, stride_n
    tags_ptr,  # u8 [L] of the image
    b_saliency,  # [BLOCK_N], or None
    o_n,
    m_n,
    m_labelled,
    K,
    stride_k,
    stride_n,
    threshold,
    saliency_weight,
    AUTHORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """E11 for a tile."""
    pixel_ptr = logits_ptr + o_n.to(tl.int64) * stride_n
    b_max = tl.zeros_like(o_n).to(tl.float32) + float("-inf")
    b_sum = tl.zeros_like(o_n).to(tl.float32)  # of exp(z - b_max)
    b_best = b_max
    b_object = tl.zeros_like(o_n)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        m_own = tl.load(tags_ptr + o_k - 1, mask=m_k & (o_k > 0), other=0) != 0
        b_z = tl.load(
            pixel_ptr[:, None] + o_k.to(tl.int64)[None, :] * stride_k, mask=m_n[:, None] & m_k[None, :], other=0
        )
        b_z = tl.where(m_k[None, :], b_z.to(tl.float32), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_z - b_new[:, None]), 1)
        b_max = b_new
        b_z = tl.where(m_own[None, :], b_z, float("-inf"))
        b_own = tl.max(b_z, 1)
        b_lowest = tl.min(tl.where(b_z == b_own[:, None], o_k[None, :], K), 1)
        b_object = tl.where(b_own > b_best, b_lowest, b_object)
        b_best = tl.maximum(b_best, b_own)
    b_best = tl.exp(b_best - b_max) / b_sum
    b_background = tl.exp(tl.load(pixel_ptr, mask=m_n, other=0).to(tl.float32) - b_max) / b_sum
    if b_saliency is not None and AUTHORS:
        b_background = saliency_weight * (1 - b_saliency) + (1 - saliency_weight) * b_background
    return _label(b_background, b_best, b_object, m_labelled, threshold)


@triton.jit
def _merge(b_first, b_second, AUTHORS: tl.constexpr):
    """E12."""
    m_first = (b_first != 0) & (b_first != _IGNORE)
    m_second = (b_second != 0) & (b_second != _IGNORE)
    m_first_yields = (m_first == 0) if AUTHORS else (b_first == _IGNORE)
    m_second_yields = (m_second == 0) if AUTHORS else (b_second == _IGNORE)
    m_takes_first = (b_first == b_second) | (m_first & m_second_yields)
    m_takes_second = m_second & m_first_yields
    return tl.where(m_takes_first, b_first, tl.where(m_takes_second, b_second, _IGNORE))


@triton.jit
def pseudo_masks_fwd_kernel(
    heatmap_ptr,  # [B, L, N], strides stride_hb, stride_hl, stride_hn
    logits_ptr,  # [B, K, N], strides stride_cb, stride_ck, stride_cn, or None
    context_ptr,  # heatmap [B, L, N], the same strides, or None
    tags_ptr,  # u8 [B, L]
    saliency_ptr,  # [B, N], or None
    valid_ptr,  # u8 [B, N], or None
    peaks_ptr,  # f32 [B, L] of the heatmap, or None
    context_peaks_ptr,  # f32 [B, L] of the context heatmap, or None
    masks_ptr,  # u8 [3 or 1, B, N]
    B,
    N,
    L,
    stride_hb,
    stride_hl,
    stride_hn,
    stride_cb,
    stride_ck,
    stride_cn,
    threshold,
    saliency_weight,
    POWER: tl.constexpr,
    CAM_AUTHORS: tl.constexpr,
    CONTEXT_AUTHORS: tl.constexpr,
    MERGE_AUTHORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    tags_ptr += i_b * L
    m_labelled = m_n
    if valid_ptr is not None:
        valid_ptr += i_b * N
        m_labelled = tl.load(valid_ptr + o_n, mask=m_n, other=0) != 0
    if saliency_ptr is not None:
        b_saliency = tl.load(saliency_ptr + i_b * N + o_n, mask=m_n, other=0).to(tl.float32)
    else:
        b_saliency = None
    if peaks_ptr is not None:
        peaks_ptr += i_b * L
    out_ptr = masks_ptr + i_b * N + o_n
    b_first = _cam_label(
        heatmap_ptr + i_b * stride_hb, tags_ptr, valid_ptr, peaks_ptr, b_saliency, o_n, m_n, m_labelled, N, L,
        stride_hl, stride_hn, threshold, POWER, CAM_AUTHORS, BLOCK_P,
    )  # fmt: skip
    tl.store(out_ptr, b_first.to(tl.uint8), mask=m_n)
    if logits_ptr is not None or context_ptr is not None:
        if context_ptr is not None:
            if context_peaks_ptr is not None:
                context_peaks_ptr += i_b * L
            b_second = _cam_label(
                context_ptr + i_b * stride_cb, tags_ptr, valid_ptr, context_peaks_ptr, b_saliency, o_n, m_n,
                m_labelled, N, L, stride_ck, stride_cn, threshold, POWER, CAM_AUTHORS, BLOCK_P,
            )  # fmt: skip
        else:
            b_second = _context_label(
                logits_ptr + i_b * stride_cb, tags_ptr, b_saliency, o_n, m_n, m_labelled, L + 1, stride_ck, stride_cn,
                threshold, saliency_weight, CONTEXT_AUTHORS, BLOCK_K,
            )  # fmt: skip
        mask_size = tl.cast(B, tl.int64) * N
        tl.store(out_ptr + mask_size, b_second.to(tl.uint8), mask=m_n)
        tl.store(out_ptr + 2 * mask_size, _merge(b_first, b_second, MERGE_AUTHORS).to(tl.uint8), mask=m_n)


def pseudo_masks(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    valid: Tensor | None,
    *,
    logits: Tensor | None,
    context_heatmap: Tensor | None,
    threshold: float,
    cam_background: str,
    background_power: float,
    context_background: str,
    saliency_weight: float,
    merge_rule: str,
) -> Tensor:
    """See `mcic.kernels.pseudo_masks`."""
    maps = [None if tensor is None else tensor.detach() for tensor in (heatmap, saliency, logits, context_heatmap)]
    heatmap, saliency, logits, context_heatmap = maps
    return _pseudo_masks(
        heatmap, tags, saliency, valid, logits, context_heatmap, threshold, background_power, saliency_weight,
        cam_background == "authors", context_background == "authors", merge_rule == "authors",
    )  # fmt: skip


@torch.library.custom_op("mcic::pseudo_masks", mutates_args=())
def _pseudo_masks(
    heatmap: Tensor,
    tags: Tensor,
    saliency: Tensor | None,
    valid: Tensor | None,
    logits: Tensor | None,
    context_heatmap: Tensor | None,
    threshold: float,
    background_power: float,
    saliency_weight: float,
    cam_authors: bool,
    context_authors: bool,
    merge_authors: bool,
) -> Tensor:
    masks = _allocate(heatmap, logits, context_heatmap)
    batch, objects = tags.shape
    pixels = heatmap.shape[2] * heatmap.shape[3]
    if masks.numel() == 0:
        return masks
    tags = tags.contiguous().view(torch.uint8)
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    saliency = None if saliency is None else saliency.contiguous()
    heatmap, logits, context_heatmap = (
        None if maps is None else maps.flatten(2) for maps in (heatmap, logits, context_heatmap)
    )
    second = logits if context_heatmap is None else context_heatmap
    device, dtype = heatmap.device, heatmap.dtype
    sizes = config("pseudo_masks_fwd_kernel", device, dtype)
    with torch.cuda.device_of(heatmap):
        peaks = context_peaks = None
        if pixels > ONE_LAUNCH_PIXELS:
            peaks = _peaks(heatmap, tags, valid)
            context_peaks = None if context_heatmap is None else _peaks(context_heatmap, tags, valid)
        pseudo_masks_fwd_kernel[triton.cdiv(pixels, sizes["BLOCK_N"]), batch](
            heatmap, logits, context_heatmap, tags, saliency, valid, peaks, context_peaks, masks, batch, pixels,
            objects, *heatmap.stride(), *((0, 0, 0) if second is None else second.stride()), threshold,
            saliency_weight, POWER=background_power, CAM_AUTHORS=cam_authors, CONTEXT_AUTHORS=context_authors,
            MERGE_AUTHORS=merge_authors, **sizes,
        )  # fmt: skip
    return masks


@_pseudo_masks.register_fake
def _(heatmap, tags, saliency, valid, logits, context_heatmap, *_):
    return _allocate(heatmap, logits, context_heatmap)


def _allocate(heatmap: Tensor, logits: Tensor | None, context_heatmap: Tensor | None) -> Tensor:
    number = 1 if logits is None and context_heatmap is None else 3
    return heatmap.new_empty((number, heatmap.shape[0], *heatmap.shape[2:]), dtype=torch.uint8)


def _peaks(heatmap: Tensor, tags: Tensor, valid: Tensor | None) -> Tensor:
    batch, objects, pixels = heatmap.shape
    peaks = torch.empty(batch, objects, dtype=torch.float32, device=heatmap.device)
    pseudo_masks_peak_kernel[objects, batch](
        heatmap, tags, valid, peaks, pixels, objects, *heatmap.stride(),
        **config("pseudo_masks_peak_kernel", heatmap.device, heatmap.dtype),
    )  # fmt: skip
    return peaks
