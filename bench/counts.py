"""The least work of each operation: bytes that must cross device memory once, operations that must be done.

Every input that is needed is read once, every output written once; a multiplication and an addition are two
operations. What a kernel may choose to store in between (the attention, for its backward pass) or to compute again is
not counted, so the limits below are lower bounds of any implementation. `readable` is Σ_b n_b, the entries that each
image may read, summed over the images; `rows` is how many rows of the bank at least one image reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Least bytes and operations of one call."""

    bytes: int
    operations: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, *, bandwidth: float, rate: float) -> float:
        """The limit: the larger of bytes over bytes per second and operations over operations per second."""
        return max(self.bytes / bandwidth, self.operations / rate)


@dataclass(frozen=True, kw_only=True)
class AttentionSize:
    """Sizes of a call of `sparse_attention` with one head.

    Attributes:
        pixels: B·N. channels: D. out: E. bank_rows: K·S.
        rows: rows of the bank that any image reads. readable: Σ_b n_b. per_image: N.
        element: bytes of an element of query, keys, values, bias and message.
    """

    pixels: int
    per_image: int
    channels: int
    out: int
    bank_rows: int
    rows: int
    readable: int
    element: int

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, class_mask: Tensor) -> AttentionSize:
        """The sizes of query [B, N, D], keys [K, S, D], values [K, S, E], counts [K], class_mask [B, K]."""
        batch, per_image, channels = query.shape
        return cls(
            pixels=batch * per_image,
            per_image=per_image,
            channels=channels,
            out=values.shape[-1],
            bank_rows=keys.shape[0] * keys.shape[1],
            rows=int((counts * class_mask.any(0)).sum()),
            readable=int((class_mask * counts).sum()),
            element=query.element_size(),
        )


def attention_forward(size: AttentionSize) -> Cost:
    """Query, the rows that are read and their bias in; message and entropy (f32) out; scores and message."""
    width = size.channels + size.out
    moved = size.element * (size.pixels * width + size.rows * (width + 1)) + 4 * size.pixels
    return Cost(moved, 2 * size.per_image * size.readable * width)


def attention_backward(size: AttentionSize, *, query_gradient: bool) -> Cost:
    """Query, rows, dmessage and dentropy in; gradients of the whole bank, and of the query, out.

    Products: da = dm·v, dv = aᵀdm, dk = dzᵀq, and with the query's gradient dq = dz·k.
    """
    width = size.channels + size.out
    read = size.element * (size.pixels * width + size.rows * (width + 1)) + 4 * size.pixels
    written = size.element * (size.bank_rows * (width + 1) + query_gradient * size.pixels * size.channels)
    products = 2 * size.out + size.channels * (1 + query_gradient)
    return Cost(read + written, 2 * size.per_image * size.readable * products)


def projections_forward(size: AttentionSize, *, entry: int = 4) -> Cost:
    """The absorbed projections: key, W_q on the keys, value and W_o on the values, each of the rows that are read.

    Bytes: the entries (of `entry` bytes an element) and four weights with their biases; what goes on to the attention
    counts there, as its input.
    """
    d = size.channels
    return Cost(entry * size.rows * d + size.element * 4 * (d * d + d), 4 * 2 * size.rows * d * d)


def projections_backward(size: AttentionSize, *, entry: int = 4) -> Cost:
    """Gradients of the four weights and biases; the entries have none, so two of the four products need one half."""
    d = size.channels
    moved = entry * size.rows * d + size.element * 2 * 4 * (d * d + d)
    return Cost(moved, 6 * 2 * size.rows * d * d)


def class_pool(features: Tensor, confidence: Tensor, class_mask: Tensor) -> Cost:
    """Features, and the confidences of the images' own classes, in; contexts, sums (f32) and valid out."""
    batch, channels, height, width = features.shape
    pixels, classes, pairs = height * width, class_mask.shape[1], int(class_mask.sum())
    read = features.element_size() * batch * channels * pixels + confidence.element_size() * pairs * pixels
    written = batch * classes * (4 * channels + 4 + 1)
    return Cost(read + class_mask.numel() + written, 2 * pairs * pixels * channels)


def ring_push(bank: Tensor, contexts: Tensor, labels: Tensor) -> Cost:
    """The rows that are stored are read and written with their ids; labels, counts and cursors are read."""
    classes, slots, channels = bank.shape
    stored = torch.bincount(labels[labels >= 0].long(), minlength=classes).clamp(max=slots)
    rows, touched = int(stored.sum()), int((stored > 0).sum())
    row = channels * (contexts.element_size() + bank.element_size()) + 2 * 8
    return Cost(rows * row + 4 * len(labels) + 2 * 4 * (classes + touched), 0)


def pseudo_masks(heatmap: Tensor, logits: Tensor, tags: Tensor, *, saliency: bool) -> Cost:
    """The tags' heatmaps, all K logits (softmax), saliency (f32) and validity in; three uint8 masks out."""
    batch, classes, height, width = logits.shape
    pixels = height * width
    maps = heatmap.element_size() * int(tags.sum()) + logits.element_size() * batch * classes
    return Cost(pixels * (maps + batch * (4 * saliency + 1 + 3)), pixels * batch * classes * 2)


def segmentation_losses_forward(logits: Tensor, masks: Tensor) -> Cost:
    """Both logit maps and the masks in; the losses out. Two operations a logit: exponential and sum."""
    maps, number = 2 * logits.numel(), masks.shape[0]
    return Cost(maps * logits.element_size() + masks.numel() + 2 * number * 4, 2 * maps)


def segmentation_losses_backward(logits: Tensor, masks: Tensor) -> Cost:
    """As the forward pass, and the gradients of both maps out."""
    forward = segmentation_losses_forward(logits, masks)
    return forward + Cost(2 * logits.numel() * logits.element_size(), 2 * 2 * logits.numel())
