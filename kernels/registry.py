"""Which implementation of an operation runs: decided before the work, with a reason, said once."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

BACKENDS = ("auto", "reference", "triton", "native")

logger = logging.getLogger("mcic.kernels")


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    Attributes:
        backend: its name, one of `BACKENDS` but `auto`.
        module: the module below this package that holds the function; imported when first used.
        usable: device type → (ok, reason), without importing the module.
    """

    backend: str
    module: str
    usable: Callable[[str], tuple[bool, str]]


def _anywhere(device_type: str) -> tuple[bool, str]:
    return True, "runs on every device"


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations, fastest first; the reference is always the last."""

    name: str
    implementations: tuple[Implementation, ...] = field(default=())

    @classmethod
    def with_reference(cls, name: str, *faster: Implementation) -> Operation:
        """An operation whose reference is `<folder>/reference.py` with a function of the operation's name."""
        reference = Implementation("reference", f"{name.rstrip('_')}.reference", _anywhere)
        return cls(name, (*faster, reference))

    def select(self, backend: str, device: torch.device) -> Callable:
        """The function that computes this operation on `device`.

        Args:
            backend: one of `BACKENDS`; `auto` reads MCIC_BACKEND and else takes the fastest that can run. A named
                backend that this operation does not have means: the operation's fastest.

        Raises:
            ValueError: an unknown backend name, or one that this operation has and that cannot run here.
        """
        return _resolve(self, _checked(backend), device.type)


def _checked(backend: str) -> str:
    name = os.environ.get("MCIC_BACKEND", "auto") if backend == "auto" else backend
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}.{hint}")
    return name


@cache
def _resolve(operation: Operation, backend: str, device_type: str) -> Callable:
    candidates = operation.implementations
    named = [c for c in candidates if c.backend == backend]
    reasons = []
    for candidate in named or candidates:
        ok, reason = candidate.usable(device_type)
        if ok:
            asked = "" if backend in ("auto", candidate.backend) else f"; it has no {backend} backend"
            logger.info("%s on %s: %s (%s%s)", operation.name, device_type, candidate.backend, reason, asked)
            module = importlib.import_module(f".{candidate.module}", __package__)
            return getattr(module, operation.name)
        reasons.append(f"{candidate.backend}: {reason}")
    raise ValueError(f"{operation.name} cannot run on {device_type} as asked ({'; '.join(reasons)})")


def describe_backends(backend: str, device: torch.device) -> str:
    """What runs on `device` when `backend` is asked for: one name, or `operation=name, …` where they differ."""
    chosen = {}
    for folder in ("sparse_attention", "class_pool", "ring_push"):
        operation: Operation = importlib.import_module(f".{folder}", __package__).OPERATION
        chosen[operation.name] = operation.select(backend, device).__module__.rsplit(".", 1)[-1]
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{name}={where}" for name, where in chosen.items())
