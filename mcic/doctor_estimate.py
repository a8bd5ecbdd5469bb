"""What a run will cost on this machine, from a few real training steps on some of its photographs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median

import torch

from mcic.build import peak_memory
from mcic.data import Batch, Dataset, EvalItem, SaliencySource, default_workers, eval_items
from mcic.evaluate import evaluate_masks, evaluate_network
from mcic.trainer import Trainer
from mcic.update import WARM_UP_CALLS

STEPS = 5
"""training steps that are measured; their median counts, for other programs disturb single ones"""
SAMPLES = 3
"""batches that are read, and images of each evaluation"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate, not a promise: other programs, disks and hot processors are not in it.

    Attributes:
        steps: updates of the whole run.
        seconds_per_step: of an update alone, on images already in memory.
        fastest_step, slowest_step: of those measured, seconds.
        read_seconds: to read and augment one image in one process, its saliency map computed before.
        first_read_seconds: the same with the map still to be computed, as in the first epoch.
        workers: loader processes of the run.
        training_seconds, evaluation_seconds: of the whole run.
        memory_gib: peak of this process on a CPU, loader processes not counted; of the allocator on a GPU.
        device: where the steps ran.
    """

    steps: int
    seconds_per_step: float
    fastest_step: float
    slowest_step: float
    read_seconds: float
    first_read_seconds: float
    workers: int
    training_seconds: float
    evaluation_seconds: float
    memory_gib: float
    device: str


def measure(trainer: Trainer, *, workers: int | None) -> Estimate:
    """Train `STEPS` steps and evaluate a few images; nothing is written, but the trainer's weights change.

    Args:
        trainer: of the run in question, but with `data.workers 0` and a `data.cache` that is empty.
        workers: `data.workers` of the run.

    Raises:
        ValueError: what training would raise at these images.
    """
    config, data, loader = trainer.config, trainer.data, trainer.loader
    batch_size = config.train.batch_size
    first_read, batches = _read(trainer)
    read, _ = _read(trainer)
    workers = default_workers(workers, data.train)
    steps = _step_seconds(trainer, batches)
    step = median(steps)
    evaluation = _evaluation_seconds(trainer)

    def epoch(read_seconds: float) -> float:
        reading = read_seconds * batch_size / max(1, workers)
        # Loader processes work beside a GPU, but on a CPU they take the time of the arithmetic.
        beside = workers > 0 and trainer.device.type == "cuda"
        return loader.steps * (max(step, reading) if beside else step + reading)

    return Estimate(
        steps=trainer.total_steps,
        seconds_per_step=step,
        fastest_step=min(steps),
        slowest_step=max(steps),
        read_seconds=read,
        first_read_seconds=first_read,
        workers=workers,
        training_seconds=epoch(first_read) + (config.train.epochs - 1) * epoch(read),
        evaluation_seconds=evaluation / max(1, workers if trainer.device.type == "cuda" else 1),
        memory_gib=peak_memory(trainer.device),
        device=str(trainer.device),
    )


def _read(trainer: Trainer) -> tuple[float, list[Batch]]:
    """Seconds per image, and the first batches."""
    started = time.perf_counter()
    batches = list(islice(trainer.loader.epoch(0), SAMPLES))
    return (time.perf_counter() - started) / (len(batches) * trainer.config.train.batch_size), batches


def _step_seconds(trainer: Trainer, batches: list[Batch]) -> list[float]:
    """Seconds of every update after those that warm up."""
    ramp = torch.ones((), device=trainer.device)
    trainer.model.train()
    warm_up = WARM_UP_CALLS + 1 if trainer.device.type == "cuda" else 2
    times = []
    for _, batch in zip(range(warm_up + STEPS), cycle(batches), strict=False):
        times.append(_timed(trainer, lambda batch=batch: trainer.update(batch.to(trainer.device), ramp)))
    return times[warm_up:]


def _evaluation_seconds(trainer: Trainer) -> float:
    """Seconds of the evaluation at the end, and of those on the way where some are asked for."""
    config, data, model = trainer.config, trainer.data, trainer.model

    def each(dataset: Dataset, saliency: SaliencySource | None, work: Callable[[Iterator[EvalItem]], object]) -> float:
        count = min(SAMPLES, len(dataset))
        items = eval_items(dataset, saliency, indices=range(count))
        return _timed(trainer, lambda: work(items)) / count

    network = partial(evaluate_network, model, protocol=config.eval.protocol, device=trainer.device)
    masks = partial(evaluate_masks, model, trainer.objective, device=trainer.device)
    rounds = 1 + ((config.train.epochs - 1) // config.eval.every if config.eval.every else 0)
    measured = len(data.train.measured(config.eval.mask_images)) if config.eval.mask_images else 0
    seconds = rounds * len(data.val) * each(data.val, None, lambda items: network(items=items))
    if measured:
        seconds += measured * each(data.train, trainer.saliency, lambda items: masks(items=items))
    return seconds


def _timed(trainer: Trainer, work: Callable[[], object]) -> float:
    def wait() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
