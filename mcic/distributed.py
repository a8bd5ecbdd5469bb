"""Several processes that compute one step together (torch.distributed); with one process, nothing happens.

Gradients are summed and losses are divided by counts of the global batch, so a run equals a single process with the
same global batch. No buffer is ever broadcast: every rank pushes the same gathered contexts, so the banks stay equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor


def initialize(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the process group that `torchrun` announces through the environment, if there is one.

    Args:
        device: of this process.
        timeout: how long one rank may wait for another before all are ended; None: torch's own (NCCL 10 minutes, gloo
            30), too short where ranks work for long, each on its own share, between two exchanges.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it starts the ranks again: addresses of the dead must not be found there.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """This process's number, 0…world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def from_first(text: str) -> str:
    """Rank 0's text, on every rank."""
    box = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks in rank order; every rank has equally many."""
    if not dist.is_initialized():
        return tensor
    rows = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over ranks through which gradients flow back to every rank's part."""
    return dist.nn.functional.all_reduce(tensor) if dist.is_initialized() else tensor


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks in one flat message per dtype; a parameter without gradient counts as 0."""
    if not dist.is_initialized():
        return
    trained = [p for p in parameters if p.requires_grad]
    for dtype in sorted({p.dtype for p in trained}, key=str):
        group = [p for p in trained if p.dtype == dtype]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in group])
        dist.all_reduce(flat)
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            # In the parameter's order of dimensions, which the fused update takes for granted.
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
