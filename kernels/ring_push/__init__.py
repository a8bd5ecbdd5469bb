"""Pushing contexts into the per-class ring buffers of the memory bank (E6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import runs_native
from ..registry import Implementation, Operation

OPERATION = Operation("ring_push_", Implementation("native", "ring_push.native", runs_native))

_rejected: dict[torch.device, Tensor] = {}  # device → int32 [], rows skipped there because of their label


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
        bank: [K, S, D] floating point, changed. Shares no memory with the contexts.
        ids: int64 [K, S], image of each entry (-1 unknown), changed.
        counts: int32 [K], changed.
        cursor: int32 [K], changed.
        contexts: [R, D]; R may be 0. No gradient flows into the bank.
        labels: int32 [R], class of each row. On the CPU a label ≥ K raises; on a GPU, and in a compiled graph of the
            reference, where a value cannot be looked at, such a row is skipped and `rejected_labels` counts it.
        context_ids: int64 [R], image of each row.
        backend: auto | reference | triton | native.

    Raises:
        ValueError: shapes or dtypes that do not fit, or (on the CPU) a label ≥ K; then nothing is changed.
        RuntimeError: the first push on a GPU inside the capture of a CUDA graph.
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
    if rows:
        function = OPERATION.select(backend, bank)
        _make_counter(bank.device)
        function(bank, ids, counts, cursor, _rejected[bank.device], contexts, labels, context_ids)


def rejected_labels(device: torch.device) -> int:
    """Rows that `ring_push_` skipped on `device` since the process started, because their label was K or more.

    Waits for the work that the device was given: for checkpoints, not for the step.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return int(_rejected[device]) if device in _rejected else 0


def _make_counter(device: torch.device) -> None:
    if device in _rejected:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("ring_push_: push once before a CUDA graph is captured, the first push allocates memory")
    with torch.inference_mode(False):
        _rejected[device] = torch.zeros((), dtype=torch.int32, device=device)


_make_counter._dynamo_marked_constant = True  # runs while tracing, as the choice of the backend does
