"""Which implementation of an operation runs: decided before the work, with a reason, said once."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "reference", "triton", "native")

OPERATIONS: dict[str, Operation] = {}
"""every operation of the package by name"""

_FUNCTIONS: dict[tuple[str, str], Callable] = {}  # (operation, backend) → what computes it, once loaded

logger = logging.getLogger("mcic.kernels")


@dataclass(frozen=True)
class Request:
    """What an implementation is asked to run on.

    Attributes:
        device: of the tensors.
        dtype: of the operation's main input.
        named: the backend was asked for by name, not found by `auto`.
    """

    device: torch.device
    dtype: torch.dtype
    named: bool


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    Attributes:
        backend: its name, one of `BACKENDS` but `auto`.
        module: the module below this package that holds the function; imported when first used.
        usable: request → (ok, reason), without importing the module.
    """

    backend: str
    module: str
    usable: Callable[[Request], tuple[bool, str]]


class Operation:
    """An operation and its implementations, fastest first; the reference is always the last.

    Args:
        name: of the operation and of the function in each implementation's module; a module `<folder>/reference.py`
            is there for every operation, folder being the name without a trailing underscore.
        faster: the other implementations.
    """

    def __init__(self, name: str, *faster: Implementation) -> None:
        reference = Implementation("reference", f"{name.rstrip('_')}.reference", _anywhere)
        self.name = name
        self.implementations = (*faster, reference)
        OPERATIONS[name] = self

    def select(self, backend: str, tensor: torch.Tensor) -> Callable:
        """The function that computes this operation on what `tensor`, its main input, is like.

        Args:
            backend: one of `BACKENDS`; `auto` reads MCIC_BACKEND and else takes the fastest that can run. A named
                backend that this operation does not have means: the operation's fastest.

        Raises:
            ValueError: an unknown backend name, or one that this operation has and that cannot run here.
        """
        return _FUNCTIONS[self.name, choose(self.name, backend, tensor.device, tensor.dtype)]


def runs_triton(request: Request) -> tuple[bool, str]:
    """Whether Triton kernels can run; its interpreter, on CPU tensors, only when asked for by name."""
    if request.dtype == torch.float64:
        return False, "the kernels have no fp64"
    if find_spec("triton") is None:
        return False, "Triton is not installed: pip install triton"
    if request.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return False, "Triton needs a GPU"
        return request.named, "Triton's interpreter, for tests" if request.named else "the interpreter is for tests"
    if request.device.type != "cuda":
        return False, "Triton kernels run on CUDA devices"
    major, minor = torch.cuda.get_device_capability(request.device)
    if major < 8:
        return False, f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return True, f"fused kernels, compute capability {major}.{minor}"


def choose(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that `Operation.select` takes; its function is loaded then."""
    if backend == "auto":
        backend = os.environ.get("MCIC_BACKEND", "auto")
    return _choose(operation, backend, device, dtype)


# What torch.compiler.assume_constant_result sets, without its import of the compiler: choosing, importing and logging
# happen while tracing and not in the graph.
choose._dynamo_marked_constant = True


@cache
def _choose(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}.{hint}")
    candidates = OPERATIONS[operation].implementations
    named = [candidate for candidate in candidates if candidate.backend == backend]
    request = Request(device, dtype, named=bool(named))
    reasons = []
    for candidate in named or candidates:
        ok, reason = candidate.usable(request)
        reasons.append(f"{candidate.backend}: {reason}")
        if ok:
            asked = "" if named or backend == "auto" else f"; it has no {backend} backend"
            logger.info("%s on %s: %s%s", operation, device, "; ".join(reversed(reasons)), asked)
            module = importlib.import_module(f".{candidate.module}", __package__)
            _FUNCTIONS[operation, candidate.backend] = getattr(module, operation)
            return candidate.backend
    raise ValueError(f"{operation} cannot run on {device} in {dtype} as asked ({'; '.join(reasons)})")


def _anywhere(_: Request) -> tuple[bool, str]:
    return True, "plain PyTorch"


def describe_backends(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What runs on `device` when `backend` is asked for: one name, or `reference (operations), native (…)`."""
    chosen: dict[str, list[str]] = {}
    for name in sorted(OPERATIONS):
        chosen.setdefault(choose(name, backend, device, dtype), []).append(name)
    if len(chosen) == 1:
        return next(iter(chosen))
    return ", ".join(f"{where} ({', '.join(names)})" for where, names in chosen.items())
