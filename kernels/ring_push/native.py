"""The push as one native operation: C++ on the CPU, one CUDA launch of a block per class on a GPU (csrc/)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import load

load()
_push = torch.ops.mcic.ring_push_.default
_changed = [argument.is_write for argument in _push._schema.arguments].count(True)  # they come first
_registrations = torch.library.Library("mcic", "IMPL")


def _count_change(keyset: torch.DispatchKeySet, *arguments: Tensor) -> None:
    """What PyTorch's own in-place operations do above their kernel; the stable C++ interface has no way to it."""
    torch.autograd.graph.increment_version(arguments[:_changed])
    _push.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)


_registrations.impl("ring_push_", _count_change, "ADInplaceOrView", with_keyset=True)


@torch.library.register_fake("mcic::ring_push_")
def _fake(*arguments: Tensor) -> None:
    """Nothing is returned: there is no shape to tell."""


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
    """See `mcic.kernels.ring_push_`."""
    if contexts.requires_grad:
        contexts = contexts.detach()
    # The operation moves bytes, so it knows no numbers: a row has the bank's type before it enters.
    _push(bank, ids, counts, cursor, rejected, contexts.to(bank.dtype), labels, context_ids)
