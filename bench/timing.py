"""Taking times: variants of one piece of work, interleaved, after a warm-up; events on a GPU, the clock on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLUSH_BYTES = 512 * 2**20
"""written between repetitions on a GPU: several times the largest L2 cache, and it lets the host run ahead"""


@dataclass(frozen=True)
class Samples:
    """Times of one variant in seconds, one a round, in the order they were taken."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The share-quantile, linear between samples."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(share).item()

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@dataclass(frozen=True)
class Ratio:
    """How much faster one variant is than another: of the medians, and 20 % and 80 % quantiles of the rounds' own."""

    of_medians: float
    low: float
    high: float


def ratio(slow: Samples, fast: Samples) -> Ratio:
    """Time of `slow` over that of `fast`; both from one interleaved measurement."""
    rounds = Samples(tuple(s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)))
    return Ratio(slow.median / fast.median, rounds.quantile(0.2), rounds.quantile(0.8))


def measure(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, warmup: int,
    flush: Tensor | None = None, failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Samples]:  # fmt: skip
    """Run every variant once a round, starting with another one each round.

    Args:
        variants: by name. device: where. rounds, warmup: counted runs of each, and those before.
        flush: of `flush_buffer`, where it was made before memory became scarce.
        failed: told of a variant that raises and of its error; that one is left out, the others go on. None: raised.
    """
    if flush is None:
        flush = flush_buffer(device)
    once = _once_cpu if flush is None else _once_cuda(flush)
    names = list(variants)
    taken: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if name not in taken:
                continue
            try:
                read = once(variants[name])
            except Exception as error:
                if failed is None:
                    raise
                del taken[name]
                failed(name, error)
                continue
            if index >= 0:
                taken[name].append(read)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: Samples(tuple(read() for read in reads)) for name, reads in taken.items()}


def flush_buffer(device: torch.device) -> Tensor | None:
    """What is read between repetitions on a GPU; None on a CPU."""
    return torch.zeros(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None


def _once_cpu(run: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _once_cuda(flush: Tensor) -> Callable[[Callable[[], object]], Callable[[], float]]:
    def once(run: Callable[[], object]) -> Callable[[], float]:
        flush.sum()  # reads: what it leaves in the cache need not be written back while `run` is timed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    return once


class Others:
    """What other processes take of the processors from now on; interleaving hides a slow phase, not a shared core."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """0…1 of all processors since the start, or None where the system does not say (not Linux)."""
        if self._start is None:
            return None
        busy, own, wall = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, busy - own) / (wall * os.cpu_count())

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.is_file():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()
