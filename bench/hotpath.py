"""The hot path on the CPU: everything between features and augmented features, ours against the published arithmetic.

Counted, on both sides, for one step in training mode: pooling the batch's contexts from given class probabilities,
pushing them into a full bank, reading the bank (projections, attention, entropy, output layer with dropout, layer
norm and ReLU, the residual sum), and the backward pass from given gradients of augmented features and entropy to all
parameters of the layer. The features carry no gradient (E16). Both get the same tensors, channels-last as our network
makes them, and start from the same bank. Not counted on either side: networks, softmax of the logits, losses, masks,
the optimizer, making the inputs. The published side keeps no image numbers of its entries; ours does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from mcic.kernels import class_pool
from torch import Tensor

from bench import published
from bench.cases import CONTEXTS, ContextCase, Inputs
from bench.results import Row
from bench.timing import Others, Samples, measure, ratio
from mcic.model import propagation
from mcic.model.memory import MemoryBank
from mcic.model.propagation import Propagation

CASES = {
    "vgg": ContextCase(batch=4, side=41, channels=512, classes=21, slots=64, objects=2),
    "resnet": ContextCase(batch=4, side=41, channels=2048, classes=21, slots=64, objects=2),
    "tiny": CONTEXTS["tiny"],
}
TARGETS = {"vgg": 3.0, "resnet": 4.0}
"""least ratio of the published time to ours"""
QUIET = 0.05
"""share of the processors that others may take before a result says so: threads that wait for each other on a shared
core make any ratio meaningless"""

Stage = Callable[[str], None]


class Ours:
    """The step with the package's own modules."""

    def __init__(self, inputs: Inputs, *, dropout: float = 0.1, backend: str = "auto") -> None:
        case = inputs.case
        self.inputs, self.backend = inputs, backend
        self.layer = Propagation(case.channels, dropout=dropout, backend=backend).to(inputs.features)
        self.bank = MemoryBank(case.classes, case.slots, case.channels, backend=backend).to(inputs.features.device)
        self.bank.entries = inputs.entries.clone()
        self.bank.counts += case.slots
        self.labels = torch.arange(case.classes, dtype=torch.int32, device=inputs.features.device)

    def step(self, stage: Stage = lambda _: None) -> tuple[Tensor, Tensor]:
        """One step; calls `stage` with the name of each part when that is done."""
        inputs = self.inputs
        self.layer.zero_grad(set_to_none=True)
        with torch.no_grad():
            contexts, _, stored = class_pool(
                inputs.features, inputs.confidence, inputs.class_mask, threshold=0.5, backend=self.backend
            )
        stage("pool")
        rows = contexts.flatten(0, 1)
        self.bank.push(rows, self.labels.where(stored, -1).flatten(), inputs.ids.repeat_interleave(len(self.labels)))
        stage("push")
        reading = self.layer(inputs.features, self.bank.entries, self.bank.counts, inputs.class_mask)
        augmented = inputs.features + reading.update
        stage("read")
        torch.autograd.backward([augmented, reading.entropy], [inputs.grad_augmented, inputs.grad_entropy])
        stage("backward")
        return augmented.detach(), reading.entropy.detach()


class Published:
    """The step as published."""

    def __init__(self, inputs: Inputs, *, dropout: float = 0.1, project_once: bool = False) -> None:
        case, features = inputs.case, inputs.features
        self.inputs = inputs
        self.layer = published.PublishedPropagation(case.channels, dropout=dropout, project_once=project_once)
        self.layer.to(features)
        self.bank = published.PublishedBank(
            case.classes, case.slots, case.channels, device=features.device, dtype=inputs.entries.dtype
        )
        counts = torch.full((case.classes,), case.slots)
        self.bank.load(inputs.entries, counts, counts * 0)

    def step(self, stage: Stage = lambda _: None) -> tuple[Tensor, Tensor]:
        """One step; calls `stage` with the name of each part when that is done."""
        inputs = self.inputs
        self.layer.zero_grad(set_to_none=True)
        contexts, labels = published.pool(inputs.features, inputs.confidence, inputs.class_mask, threshold=0.5)
        stage("pool")
        self.bank.push(contexts, labels)
        stage("push")
        memory, labels = self.bank.pull(inputs.class_mask.any(0))
        augmented, entropy = self.layer(inputs.features, memory, labels, inputs.class_mask)
        stage("read")
        torch.autograd.backward([augmented, entropy], [inputs.grad_augmented, inputs.grad_entropy])
        stage("backward")
        return augmented.detach(), entropy.detach()


def variants(inputs: Inputs, *, dropout: float = 0.1) -> dict[str, Ours | Published]:
    """The compared steps; all layers have the same parameters."""
    made = {
        "published": Published(inputs, dropout=dropout),
        "published, projected once": Published(inputs, dropout=dropout, project_once=True),
        "ours": Ours(inputs, dropout=dropout),
    }
    for other in list(made.values())[1:]:
        other.layer.load_state_dict(made["published"].layer.state_dict())
    return made


def breakdown(steps: dict[str, Ours | Published], *, rounds: int) -> dict[str, dict[str, Samples]]:
    """The time of each part of each step, interleaved; `attention` is the part of `read` inside the attention."""
    parts: dict[str, dict[str, list[float]]] = {label: {} for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            _split(step, parts[label])
    return {label: {part: Samples(tuple(taken)) for part, taken in found.items()} for label, found in parts.items()}


def _split(step: Ours | Published, parts: dict[str, list[float]]) -> None:
    last = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts.setdefault(name, []).append(now - last)
        last = now

    with _clocked(step, parts):
        step.step(stage)


@contextmanager
def _clocked(step: Ours | Published, parts: dict[str, list[float]]) -> Iterator[None]:
    target, name = (propagation, "sparse_attention") if isinstance(step, Ours) else (step.layer, "attend")
    original = getattr(target, name)
    seconds = 0.0

    def clocked(*args: object, **kwargs: object) -> object:
        nonlocal seconds
        start = time.perf_counter()
        result = original(*args, **kwargs)
        seconds += time.perf_counter() - start
        return result

    with mock.patch.object(target, name, clocked):
        yield
    parts.setdefault("attention", []).append(seconds)


def rows(name: str, *, rounds: int, warmup: int = 2) -> Iterator[Row]:
    """One case on the CPU: the whole step of each variant and its parts, all in one run."""
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.inputs(torch.device("cpu"), torch.float32)
    agree(case)
    steps = variants(inputs)
    runs = {label: step.step for label, step in steps.items()}
    others = Others()
    samples = measure(runs, torch.device("cpu"), rounds=rounds, warmup=warmup)
    share = others.share() or 0.0
    busy = f"; NOT A QUIET MACHINE: others took {share:.0%} of it" if share > QUIET else ""
    reference = samples["published"]
    for label, taken in samples.items():
        times = ratio(reference, taken)
        row = _row(name, case, "step", label, taken)
        row.speedup, row.speedup_p20, row.speedup_p80 = times.of_medians, times.low, times.high
        if label == "ours" and name in TARGETS:
            met = "met" if times.of_medians >= TARGETS[name] else "MISSED"
            row.note = f"target ≥ {TARGETS[name]:g}×: {met}{busy}"
        yield row
    for label, parts in breakdown(steps, rounds=max(3, rounds // 3)).items():
        for part, taken in parts.items():
            row = _row(name, case, part, label, taken)
            row.note = "part of read" if part == "attention" else ""
            yield row


def _row(name: str, case: ContextCase, work: str, variant: str, taken: Samples) -> Row:
    row = Row(
        group="hot-path", name="context branch", case=f"{name} ({case.describe()})", scope="step", work=work,
        variant=variant, dtype="float32", timed="clock",
    )  # fmt: skip
    row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * taken.quantile(share) for share in (0.2, 0.5, 0.8))
    return row


def agree(case: ContextCase) -> None:
    """Raise ArithmeticError unless all variants compute the same in fp64, twice in a row, on a small grid."""
    small = dataclasses.replace(case, side=9, channels=32, slots=8)  # more pixels than rows, as there
    steps = variants(small.inputs(torch.device("cpu"), torch.float64), dropout=0.0)
    for _ in range(2):  # the second reads what the first pushed
        results = {label: step.step() for label, step in steps.items()}
        for label, step in steps.items():
            pairs = [*zip(results[label], results["published"], strict=True)]
            pairs += [
                (ours.grad, theirs.grad)
                for ours, theirs in zip(step.layer.parameters(), steps["published"].layer.parameters(), strict=True)
            ]
            # An absolute measure: the gradient of the key's bias is 0 but for rounding.
            error = max((a - b).abs().max().item() / max(1, b.abs().max().item()) for a, b in pairs)
            if not error < 1e-9:
                raise ArithmeticError(f"{label} computes something else than published: error {error}")
