"""Several processes that compute one step together (torch.distributed); with one process, nothing happens.

Gradients are summed and losses are divided by counts of the global batch, so a run equals a single process with the
same global batch. No buffer is ever broadcast: every rank pushes the same gathered contexts, so the banks stay equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcic.watch import Watch

SHARED_WORK = timedelta(hours=24)
"""how long a rank that has made its share of a command's work waits for the others"""

SLACK = timedelta(minutes=1)
"""by which torch's own timeout, which names nobody, comes after ours"""
_watch: Watch | None = None


def initialize(device: torch.device, timeout: timedelta = SHARED_WORK) -> None:
    """Join the process group that `torchrun` announces through the environment, if there is one.

    Args:
        device: of this process.
        timeout: how long a rank may wait for another before it ends and names that one, see `mcic.watch`.
    """
    global _watch
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs belong to the current one
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it starts the ranks again: addresses of the dead must not be found there.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout + SLACK)
        _watch = Watch(store.clone(), rank=rank, world_size=world_size, patience=timeout.total_seconds())
        barrier()  # every rank is watched from here


def finish() -> None:
    """Leave the process group."""
    global _watch
    if _watch is not None:
        _watch.end()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0…world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if _exchanging():
        dist.barrier()


def from_first(text: str) -> str:
    """Rank 0's text, on every rank."""
    box = [text]
    if _exchanging():
        dist.broadcast_object_list(box)
    return box[0]


def same_everywhere(text: str) -> bool:
    """Whether all ranks have the same text; they all get the same answer."""
    boxes: list[Any] = [text] * world_size()
    if _exchanging():
        dist.all_gather_object(boxes, text)
    return len(set(boxes)) == 1


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks in rank order; every rank has equally many."""
    if not _exchanging():
        return tensor
    rows = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if _exchanging():
        dist.all_reduce(tensor)
    return tensor


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over ranks through which gradients flow back to every rank's part."""
    return _SumWithGradient.apply(tensor) if dist.is_initialized() else tensor


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_(gradient.clone(memory_format=torch.contiguous_format))


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks in one flat message per dtype; one that is missing is 0, also of a single process,
    so that weight decay treats its parameter alike whatever the number of ranks."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not _exchanging():
        return
    for dtype in sorted({p.dtype for p in trained}, key=str):
        group = [p for p in trained if p.dtype == dtype]
        flat = torch.cat([p.grad.flatten() for p in group])
        dist.all_reduce(flat)
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            # In the parameter's order of dimensions, which the fused update takes for granted.
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))


def _exchanging() -> bool:
    """Whether there are other ranks; if so, this one is about to wait for them."""
    if _watch is not None and not torch.compiler.is_compiling():  # a count would be a guard, and every step compile
        _watch.entered += 1
    return dist.is_initialized()
