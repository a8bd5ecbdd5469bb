"""What a step computed on the device, brought to the host without a step waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mcic import distributed

LAG = 4
"""steps by which the host runs ahead of the figures on a GPU"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of one step.

    Attributes:
        step: updates so far, this one included.
        metrics: its figures over all ranks, and what the host knew of it.
        stop: some rank was asked to stop.
        seconds: of training up to the end of this step.
    """

    step: int
    metrics: dict[str, float]
    stop: bool
    seconds: float


class Meter:
    """Sums the figures of every step over the ranks and hands them out, on a GPU `lag` steps later.

    The lag is a number of steps, not a matter of what is finished: so all ranks learn of the same step in the same
    place, and what follows from it they do together.

    Args:
        device: where the figures are.
        lag: steps; None: `LAG` on a GPU, else 0.

    Attributes:
        seconds: of training, up to the last step that was handed out.
    """

    def __init__(self, device: torch.device, *, lag: int | None = None) -> None:
        self.device = device
        self.lag = (LAG if device.type == "cuda" else 0) if lag is None else lag
        self.seconds = 0.0
        self._sent: deque[_Sent] = deque()
        self._last: _Moment | None = None

    def start(self) -> None:
        """Time counts from here; what came since the last step was no training."""
        self._last = _Moment(self.device)

    def put(self, step: int, figures: Mapping[str, Tensor], facts: Mapping[str, float], *, stop: bool) -> None:
        """Note a step; every rank calls it after every step.

        Args:
            step: updates so far.
            figures: scalars on the device, this rank's share of each.
            facts: what the host knows.
            stop: this rank was asked to stop.
        """
        asked = torch.full((), float(stop), device=self.device)  # filled there: nothing to wait for
        values = distributed.sum_(torch.stack([*figures.values(), asked]).detach().double())
        if self.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        self._sent.append(_Sent(step, tuple(figures), dict(facts), values, _Moment(self.device)))

    def take(self, *, all_: bool = False) -> Iterator[Reading]:
        """The steps that are more than `lag` behind, or all that were put, in order; waits for them."""
        while len(self._sent) > (0 if all_ else self.lag):
            sent = self._sent.popleft()
            self.seconds += sent.moment.since(self._last)
            self._last = sent.moment
            *values, stop = sent.values.tolist()
            metrics = dict(zip(sent.names, values, strict=True)) | sent.facts
            yield Reading(sent.step, metrics, stop > 0, self.seconds)


@dataclass(frozen=True, slots=True)
class _Sent:
    step: int
    names: tuple[str, ...]
    facts: dict[str, float]
    values: Tensor  # f64 on the host, there when the moment has come
    moment: _Moment


class _Moment:
    """A point in time: of the device's work where it is a GPU, else of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True, blocking=True) if device.type == "cuda" else None
        self._clock = time.perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def since(self, earlier: _Moment) -> float:
        """Seconds from an earlier moment to this one, which is waited for."""
        if self._event is None:
            return self._clock - earlier._clock
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
