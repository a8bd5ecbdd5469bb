"""The push in plain PyTorch: no loop over classes, no value read by the host."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ring_push_(
    bank: Tensor,
    ids: Tensor,
    counts: Tensor,
    cursor: Tensor,
    rejected: Tensor,
    contexts: Tensor,
    labels: Tensor,
    context_ids: Tensor,
) -> None:
    """See `mcic.kernels.ring_push_`; `rejected` is what `rejected_labels` reads."""
    classes, slots, _ = bank.shape
    device = bank.device
    if device.type == "cpu" and not torch.compiler.is_compiling() and int(labels.max()) >= classes:
        raise ValueError(f"ring_push_: labels must be below the {classes} classes of the bank, got {int(labels.max())}")
    rejected += (labels >= classes).sum()
    belongs = labels[:, None] == torch.arange(classes, device=device)  # [R, K]
    position = belongs.cumsum(0) - 1  # place of a row among its class's rows of this push
    arrivals = belongs.sum(0)  # [K]

    skipped = ~belongs.any(1)
    label = labels.long().masked_fill(skipped, 0)
    rank = position.gather(1, label[:, None])[:, 0]
    outrun = rank < arrivals[label] - slots  # more than S rows of one class: only the last S stay
    slot = (cursor[label] + rank) % slots
    nowhere = classes * slots
    target = (label * slots + slot).masked_fill(skipped | outrun, nowhere)

    # Each slot looks up the row that lands on it: a gather, so that duplicates and skipped rows need no compaction.
    source = torch.full((nowhere + 1,), -1, dtype=torch.long, device=device)
    source.scatter_(0, target, torch.arange(len(labels), device=device))
    source = source[:-1].view(classes, slots)
    written = source >= 0
    row = source.clamp(min=0)
    bank.copy_(torch.where(written[..., None], contexts[row].to(bank.dtype), bank))
    ids.copy_(torch.where(written, context_ids[row], ids))
    cursor.copy_((cursor + arrivals) % slots)
    counts.copy_((counts + arrivals).clamp(max=slots))
