"""Reading the bank: cross-image attention and the augmented features (E7–E10)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcic.ops import attention_weights, sparse_attention


@dataclass(frozen=True, slots=True)
class Reading:
    """What the pixels read.

    Attributes:
        update: O(m) of E10, [B, D, H, W], 0 where an image may read nothing.
        entropy: of the attention, [B, H·W] in nats (E8).
    """

    update: Tensor
    entropy: Tensor


class Propagation(nn.Module):
    """Every pixel attends to the stored contexts of its image's classes.

    The embeddings of query, key, value and output are absorbed (docs/method.md): instead of all B·N pixels, the
    bank's rows are projected, `fᵀ(W_qᵀ r') + b_qᵀ r'` with r' = W_k r + b_k, and `Σ a (W_o v) + b_o`; where the bank
    has more rows than the batch has pixels, W_k is folded into the query and W_o W_v follows the message instead.
    Both are exact.

    Args:
        channels: D, a multiple of heads.
        heads: attention heads.
        temperature: τ of E7; None: √(D / heads).
        threshold: θ of the sparse attention.
        dropout: of the output embedding O: linear → dropout → layer norm → ReLU.
        gain: what the layer norm's gain starts from, above 0; below 1, f̃ = f + message starts near f.
        backend: who computes the attention.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        temperature: float | None = None,
        threshold: float = 0.0,
        dropout: float = 0.1,
        gain: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"--method.heads must divide the {channels} feature channels, got {heads}")
        self.heads = heads
        self.scale = 1 / (temperature if temperature is not None else math.sqrt(channels / heads))
        self.threshold = threshold
        self.backend = backend
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = dropout
        self.norm = nn.LayerNorm(channels)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, features: Tensor, entries: Tensor, counts: Tensor, class_mask: Tensor) -> Reading:
        """Read the bank.

        Args:
            features: [B, D, H, W], the query.
            entries: [K, S, D] of the bank.
            counts: int32 [K].
            class_mask: bool [B, K], classes each image may read.
        """
        height, width = features.shape[-2:]
        query = features.flatten(2).transpose(1, 2)  # [B, N, D], a view of channels-last features
        message, entropy = self.message(query, entries, counts, class_mask)
        update = F.relu(self.norm(self._drop(message)))
        readable = (class_mask & (counts > 0)).any(1)
        if not self._narrows(readable) or not readable.all():
            update = update * readable[:, None, None]
        return Reading(update.transpose(1, 2).unflatten(2, (height, width)), entropy)

    def message(self, query: Tensor, entries: Tensor, counts: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor]:
        """W_o m + b_o for query [B, N, D] → ([B, N, D], entropy [B, N])."""
        if self._narrows(entries):  # then only rows that somebody reads are projected
            entries, counts, class_mask = _read_rows(entries, counts, class_mask)
        entries = entries.to(self.key.weight.dtype)  # a 16-bit bank is read as what it holds
        rows = entries.shape[0] * entries.shape[1]
        if rows > query.shape[0] * query.shape[1]:
            return self._message_raw_bank(query, entries, counts, class_mask)
        keys, bias = self._keys(entries)
        values = torch.einsum("ksnd,end->nkse", self._split(self.value(entries)), self._split(self.output.weight))
        values = values + self.output.bias / self.heads  # Σ a = 1, so every message carries it
        message, entropy = self._attend(query, keys.to(query.dtype), values.to(query.dtype), bias, counts, class_mask)
        return message, entropy

    def weights(self, features: Tensor, entries: Tensor, counts: Tensor, class_mask: Tensor) -> Tensor:
        """The attention of each pixel, mean over heads: [B, N, K, S]."""
        query = features.flatten(2).transpose(1, 2)
        keys, bias = self._keys(entries)
        weights = attention_weights(query, keys, bias, counts, class_mask, scale=self.scale, threshold=self.threshold)
        return weights.mean(1)

    def _keys(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [heads, K, S, D] and their bias [heads, K, S], the query's projection absorbed."""
        projected = self._split(self.key(entries.to(self.key.weight.dtype)))  # [K, S, heads, D/heads]
        weight = self.query.weight.view(self.heads, -1, self.query.in_features)
        keys = torch.einsum("ksnd,nde->nkse", projected, weight)
        bias = torch.einsum("ksnd,nd->nks", projected, self._split(self.query.bias)) * self.scale
        return keys, bias

    def _message_raw_bank(
        self, query: Tensor, entries: Tensor, counts: Tensor, class_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        # b_k adds the same to every score of a pixel, so the softmax does not see it.
        per_head = self._split(self.query(query))  # [B, N, heads, D/heads]
        key_weight = self.key.weight.view(self.heads, -1, self.key.in_features)
        value_weight = self.value.weight.view(self.heads, -1, self.value.in_features)
        readable = (class_mask & (counts > 0)).any(1)[:, None, None]
        parts, entropies = [], []
        for head in range(self.heads):
            folded = per_head[:, :, head] @ key_weight[head]
            read, entropy = self._attend(folded, entries, entries, None, counts, class_mask)
            bias = self._split(self.value.bias)[head] * readable  # Σ a = 1 where there is anything to read
            parts.append(read.to(query.dtype) @ value_weight[head].T + bias)
            entropies.append(entropy)
        return self.output(torch.cat(parts, -1)), torch.stack(entropies).mean(0)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, counts: Tensor, class_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        attend = partial(sparse_attention, scale=self.scale, threshold=self.threshold, backend=self.backend)
        if not self._narrows(query):
            return attend(query, keys, values, bias, counts, class_mask)
        # Image by image, each given its own classes and no others: the reference computes what it is given.
        tables = [(keys.unbind(-3), -3), (values.unbind(-3), -3), (bias if bias is None else bias.unbind(-2), -2)]
        parts = []
        for image, mask in zip(query.split(1), class_mask, strict=True):
            own = _at_least_one(mask)
            entries = [rows and torch.stack([rows[k] for k in own.tolist()], dim) for rows, dim in tables]
            parts.append(attend(image, *entries, counts[own], mask[None, own]))
        messages, entropies = zip(*parts, strict=True)
        return torch.cat(messages), torch.cat(entropies)

    def _narrows(self, tensor: Tensor) -> bool:
        """Whether to leave out what no image needs: where reading a value costs no waiting, but for fused kernels."""
        return tensor.device.type == "cpu" and self.backend != "triton" and not torch.compiler.is_compiling()

    def _drop(self, message: Tensor) -> Tensor:
        if self.training and self.dropout > 0 and message.device.type == "cpu" and not torch.compiler.is_compiling():
            return message * dropout_mask(message, self.dropout)
        return F.dropout(message, self.dropout, self.training)

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1))


def dropout_mask(like: Tensor, probability: float) -> Tensor:
    """Factors 0 with `probability`, rounded to a multiple of 2⁻¹⁶, else such that their mean is 1.

    PyTorch draws a double for each element on the CPU, which takes as long as the attention; here 16 bits decide.
    """
    dropped = round(probability * 2**16)
    if dropped >= 2**16:
        return torch.zeros_like(like)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = words[: like.numel()].view(like.shape) >= dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropped))


def _read_rows(entries: Tensor, counts: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bank cut down to the classes that some image of the batch reads and the slots that are filled."""
    classes = _at_least_one(class_mask.any(0) & (counts > 0))
    counts = counts[classes]
    return entries[classes, : max(int(counts.max()), 1)], counts, class_mask[:, classes]


def _at_least_one(mask: Tensor) -> Tensor:
    """Where a mask is true; 0 where nowhere, so that no dimension vanishes."""
    found = mask.nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)
