"""Pushing contexts into the per-class ring buffers of the memory bank (E6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Operation

OPERATION = Operation("ring_push_")


def ring_push_(
    bank: Tensor,
    ids: Tensor,
    counts: Tensor,
    cursor: Tensor,
    contexts: Tensor,
    labels: Tensor,
    context_ids: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Append rows to the queues of their classes, in place and in order; the oldest entries are overwritten.

    `cursor[k]` is the next slot that class k writes, `counts[k] ≤ S` the number of its valid slots. If one push
    brings more than S rows of a class, the last S stay. Rows with a negative label are skipped.

    Args:
        bank: [K, S, D] floating point, changed.
        ids: int64 [K, S], image of each entry (-1 unknown), changed.
        counts: int32 [K], changed.
        cursor: int32 [K], changed.
        contexts: [R, D]; R may be 0. No gradient flows into the bank.
        labels: int32 [R], class of each row; on the CPU a label ≥ K raises, on a GPU such a row is skipped.
        context_ids: int64 [R], image of each row.
        backend: auto | reference | triton | native.

    Raises:
        ValueError: shapes or dtypes that do not fit, or (on the CPU) a label ≥ K.
    """
    classes, slots, channels = bank.shape
    rows = contexts.shape[0]
    expected = {
        "ids": (ids, (classes, slots), torch.int64),
        "counts": (counts, (classes,), torch.int32),
        "cursor": (cursor, (classes,), torch.int32),
        "contexts": (contexts, (rows, channels), contexts.dtype),
        "labels": (labels, (rows,), torch.int32),
        "context_ids": (context_ids, (rows,), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != bank.device:
            raise ValueError(
                f"ring_push_: {name} must be {dtype} {list(shape)} on {bank.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if bank.device.type == "cpu" and rows and int(labels.max()) >= classes:
        raise ValueError(f"ring_push_: labels must be below the {classes} classes of the bank, got {int(labels.max())}")
    if rows:
        OPERATION.select(backend, bank)(bank, ids, counts, cursor, contexts, labels, context_ids)
