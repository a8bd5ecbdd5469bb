"""One update of the weights: eagerly, or recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mcic import distributed
from mcic.data.base import Batch
from mcic.model import MCIC
from mcic.objective import Objective, push
from mcic.optim import gradient_norm

WARM_UP_CALLS = 3
"""eager updates before a graph is recorded: lazy initialisation and the optimizer's state must be behind it"""


class Update:
    """Forward, backward and optimizer step on one batch; no value is read by the host.

    Where the gradient is not finite the device skips the step: weights, momentum and the statistics of batch norm
    stay as they were. In fp16 the scaler skips, and lowers its scale.

    Args:
        model, objective, optimizer, scaler: what a run trains with.
        dtype: of the forward pass under autocast; float32: no autocast.
        accumulate: micro-batches per update.
        clip_grad: largest norm of the gradient, or None.
    """

    def __init__(
        self, model: MCIC, objective: Objective, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *,
        dtype: torch.dtype = torch.float32, accumulate: int = 1, clip_grad: float | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.scaler = scaler
        self.dtype = dtype
        self.accumulate = accumulate
        self.clip_grad = clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trained = (module for name, module in model.named_modules() if not name.startswith("ema."))
        norms = [module for module in trained if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]  # of frozen ones nothing moves

    def __call__(self, batch: Batch, ramp: Tensor) -> dict[str, Tensor]:
        """Update the weights; returns this rank's share of every figure, still on the device.

        Args:
            batch: this rank's images.
            ramp: λ of E15, a scalar on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.statistics]
        summed: dict[str, Tensor] = {}
        for part in _split(batch, self.accumulate):
            with torch.autocast(part.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = self.objective(self.model, part, ramp)
            self.scaler.scale(output.total / self.accumulate).backward()
            if output.contexts is not None:
                push(self.model, output.contexts)
            for name, value in output.terms.items():
                summed[name] = summed.get(name, 0) + value / self.accumulate
        norm, skipped = self._step()
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(skipped, old, buffer))
        self.model.update_ema()
        share = 1 / distributed.world_size()
        return summed | {"grad_norm": norm * share, "skipped": skipped.float() * share}

    def _step(self) -> tuple[Tensor, Tensor]:
        """The gradient's norm, and whether the step was skipped."""
        distributed.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        skipped = ~norm.isfinite()
        self.optimizer.found_inf = skipped.float()  # the fused update does nothing where it is 1
        self.optimizer.step()  # not the scaler's, which knows of single values alone: finite ones may have no norm
        self.scaler.update()
        return norm, skipped


class GraphedUpdate:
    """An `Update` as one CUDA graph: after `WARM_UP_CALLS` eager ones, each call is a single launch.

    Every batch must have the shapes of the first. The figures that a call returns are overwritten by the next one.
    Random numbers follow the generator's seed as in eager mode; seed it before the call.
    """

    def __init__(self, update: Callable[[Batch, Tensor], dict[str, Tensor]]) -> None:
        self.update = update
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()
        self.batch: Batch | None = None
        self.ramp: Tensor | None = None
        self.figures: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, ramp: Tensor) -> dict[str, Tensor]:
        """As `Update.__call__`."""
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            return self._eager(batch, ramp)
        if self.batch is None:
            self.batch = Batch(*(field if field is None else field.clone() for field in _fields(batch)))
            self.ramp = ramp.clone()
            # Records, computes nothing. The thread that pins the loader's memory may go on meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.figures = self.update(self.batch, self.ramp)
        for ours, theirs in zip(_fields(self.batch), _fields(batch), strict=True):
            if ours is not None:
                ours.copy_(theirs)
        self.ramp.copy_(ramp)
        self.graph.replay()
        return self.figures

    def _eager(self, batch: Batch, ramp: Tensor) -> dict[str, Tensor]:
        stream = torch.cuda.Stream()  # as the recording will: not on the default stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            figures = self.update(batch, ramp)
        torch.cuda.current_stream().wait_stream(stream)
        return figures


def _fields(batch: Batch) -> list[Tensor | None]:
    return [getattr(batch, name) for name in Batch.__slots__]


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch as `parts` micro-batches."""
    chunks = [[None] * parts if field is None else field.chunk(parts) for field in _fields(batch)]
    for part in zip(*chunks, strict=True):
        yield Batch(*part)
