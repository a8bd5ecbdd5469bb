"""The memory bank (E6): one ring buffer of contexts per class, all in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcic.ops import ring_push_


class MemoryBank(nn.Module):
    """S contexts for each of K classes.

    Buffers (saved with the model, never broadcast between ranks):
        entries: [K, S, D], f32 unless asked otherwise; slots < counts[k] are valid.
        ids: int64 [K, S], index of the image that an entry came from, -1 unknown.
        counts: int32 [K], valid slots.
        cursor: int32 [K], next slot to write.
    """

    entries: Tensor
    ids: Tensor
    counts: Tensor
    cursor: Tensor

    def __init__(
        self, num_classes: int, slots: int, channels: int, *, dtype: torch.dtype | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.backend = backend
        self.register_buffer("entries", torch.zeros(num_classes, slots, channels, dtype=dtype))
        self.register_buffer("ids", torch.full((num_classes, slots), -1, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int32))
        self.register_buffer("cursor", torch.zeros(num_classes, dtype=torch.int32))

    def push(self, contexts: Tensor, labels: Tensor, image_ids: Tensor) -> None:
        """Append rows [R, D] to the queues of their classes int32 [R] (negative: skipped), in order."""
        contexts = contexts.detach().to(self.entries.dtype)
        ring_push_(self.entries, self.ids, self.counts, self.cursor, contexts, labels, image_ids, backend=self.backend)

    def can_hold(self, contexts: Tensor) -> Tensor:
        """bool [...]: which vectors [..., D] are finite in the bank's precision; others would stay for a long time."""
        return contexts.to(self.entries.dtype).isfinite().all(-1)

    def fill(self) -> Tensor:
        """Share of the slots that are valid, a scalar 0…1."""
        return self.counts.sum() / self.ids.numel()
