"""The published arithmetic of the context branch in plain PyTorch: what the fused path is measured against.

It computes what `mcic.model` computes, in the way the method was published:

- pooling: one batched product over all K classes, then the rows of stored contexts are picked out (a host read);
- push: a Python loop over the classes with host reads; a full queue shifts, it is no ring;
- read: the queues of every class that any image of the batch has, concatenated (host reads), expanded to every image
  and masked there; query, key, value and output projections on all B·N pixels and all B·M expanded rows;
- attention: dense scores over that union, softmax, entropy and message.

`project_once` projects the memory before it is expanded: not as published, the one change anybody would make first.
`threshold` is the eager form of the thresholded attention; 0 is the published one. One head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedBank:
    """One queue of S contexts for each of K classes, oldest first."""

    def __init__(
        self, num_classes: int, slots: int, channels: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.slots = slots
        self.queues = [torch.zeros(slots, channels, device=device, dtype=dtype) for _ in range(num_classes)]
        self.lengths = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(self, contexts: Tensor, labels: Tensor) -> None:
        """Append rows [R, D] to the queues of their classes int64 [R]."""
        belongs = F.one_hot(labels, len(self.queues)).T.bool()  # [K, R]
        arrived = belongs.any(1)
        for k, queue in enumerate(self.queues):
            if not arrived[k]:
                continue
            rows = contexts[belongs[k]][-self.slots :]
            length, more = int(self.lengths[k]), len(rows)
            surplus = length + more - self.slots
            if surplus <= 0:
                queue[length : length + more] = rows
            else:
                queue.copy_(torch.cat([queue[surplus:length], rows]))
            self.lengths[k] = min(length + more, self.slots)

    @torch.no_grad()
    def pull(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The queues of the classes bool [K], in one: rows [M, D] and their classes int64 [M]."""
        rows, labels = [], []
        for k in classes.nonzero().flatten():
            length = int(self.lengths[k])
            rows.append(self.queues[k][:length])
            labels.append(k.expand(length))
        return torch.cat(rows), torch.cat(labels)

    def load(self, entries: Tensor, counts: Tensor, cursor: Tensor) -> None:
        """Take the contents of a ring buffer [K, S, D]."""
        for k, queue in enumerate(self.queues):
            length = int(counts[k])
            order = (int(cursor[k]) - length + torch.arange(length, device=entries.device)) % self.slots
            queue[:length] = entries[k, order]
            self.lengths[k] = length


@torch.no_grad()
def pool(
    features: Tensor, confidence: Tensor, class_mask: Tensor, *, threshold: float, rule: str = "paper"
) -> tuple[Tensor, Tensor]:
    """The stored contexts of a batch (E4, E5): rows [R, D] and their classes int64 [R].

    `confidence` is of probabilities under `paper` and of raw logits under `authors`, as in `mcic.kernels.class_pool`.
    """
    scores, least = confidence, 0
    if rule == "authors":
        scores, least = confidence.relu(), 1
        scores = scores / scores.amax((2, 3), keepdim=True).clamp(min=1e-5)
    scores = scores * class_mask[:, :, None, None]
    weights = scores * (scores > threshold)  # [B, K, H, W]
    if rule == "authors":
        weights = weights * F.one_hot(scores.argmax(1), scores.shape[1]).permute(0, 3, 1, 2)
    sums = weights.sum((2, 3))
    pixels = features.flatten(2).transpose(1, 2)
    contexts = torch.bmm(weights.flatten(2).to(pixels.dtype), pixels) / sums[..., None].clamp(min=1e-5)
    labels = torch.arange(class_mask.shape[1], device=features.device).expand(len(features), -1)
    stored = class_mask & (sums > least)
    return contexts[stored], labels[stored]


class PublishedPropagation(nn.Module):
    """The attention layer; the names of the parameters are those of `mcic.model.propagation.Propagation`."""

    def __init__(
        self, channels: int, *, dropout: float = 0.1, threshold: float = 0.0, project_once: bool = False
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.project_once = project_once
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor, memory: Tensor, labels: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, D, H, W], memory [M, D], labels int64 [M] → augmented features [B, D, H, W], entropy [B, N]."""
        hidden = self.hidden(class_mask, labels)
        message, entropy = self.message(features.flatten(2).permute(2, 0, 1), memory, hidden)
        update = F.relu(self.norm(self.dropout(message)))
        return update.permute(1, 2, 0).reshape(features.shape) + features, entropy

    @staticmethod
    def hidden(class_mask: Tensor, labels: Tensor) -> Tensor:
        """Which rows each image may not read, bool [B, M]."""
        return ~class_mask[:, labels]

    def message(self, query: Tensor, memory: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """query [N, B, D], memory [M, D] → W_o m + b_o [N, B, D] and entropy [B, N]."""
        keys, values = self.project(memory, query.shape[1])
        read, entropy = self.attend(self.query(query), keys, values, hidden)
        return self.output(read), entropy

    def project(self, memory: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [M, B, D]."""
        memory = memory.to(self.key.weight.dtype)
        expanded = memory[:, None].expand(-1, batch, -1)
        if self.project_once:
            return self.key(memory)[:, None].expand_as(expanded), self.value(memory)[:, None].expand_as(expanded)
        return self.key(expanded), self.value(expanded)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """query [N, B, D], keys and values [M, B, D] → read [N, B, D] and entropy [B, N]."""
        query = (query / math.sqrt(query.shape[-1])).transpose(0, 1)
        scores = torch.bmm(query, keys.permute(1, 2, 0))  # [B, N, M]
        scores = scores.masked_fill(hidden[:, None], -math.inf)
        weights = scores.softmax(-1)
        entropy = -(weights * (weights + torch.finfo(weights.dtype).tiny).log()).sum(-1)
        if self.threshold > 0:
            weights = self._sparse(scores, weights, hidden)
        return torch.bmm(weights, values.transpose(0, 1)).transpose(0, 1), entropy

    def _sparse(self, scores: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        readable = (~hidden).sum(1)[:, None, None]
        keep = (weights >= self.threshold / readable) | (scores == scores.amax(-1, keepdim=True))
        return scores.masked_fill(~keep, -math.inf).softmax(-1)


def losses(logits: Tensor, context_logits: Tensor, masks: Tensor) -> Tensor:
    """One cross-entropy for each pair of map and mask (E13): maps [B, K, H, W], masks uint8 [M, B, H, W] → [2, M]."""
    return torch.stack(
        [
            torch.stack([F.cross_entropy(scores.float(), mask.long(), ignore_index=255) for mask in masks])
            for scores in (logits, context_logits)
        ]
    )
