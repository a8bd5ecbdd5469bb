"""What was aimed at, beside what the kept results say: met, missed, or still waiting for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.hotpath import TARGETS

Found = tuple[str, bool]
"""the measured value as text, and whether the target is met"""


class MissingError(LookupError):
    """No number for a target in the results."""


@dataclass(frozen=True)
class Rows:
    """The rows of all runs on one kind of device."""

    rows: list[dict[str, Any]]

    def find(self, name: str, case: str, work: str, *variants: str) -> dict[str, Any]:
        """The first of the variants that has a time; a graph's replay comes before single launches by being named so.

        Raises:
            MissingError: none has.
        """
        for variant in variants:
            for row in self.rows:
                fits = (row["name"], row["work"], row["variant"]) == (name, work, variant)
                if fits and row["case"].startswith(case) and row["p50_ms"] is not None:
                    return row
        raise MissingError(f"{name} {case} {work}")

    def attention(self, case: str, work: str, *variants: str) -> dict[str, Any]:
        """The dense operation, θ = 0."""
        chosen = [r for r in self.rows if r["name"] == "sparse_attention" and r["case"].endswith("θ 0)")]
        return Rows(chosen).find("sparse_attention", case, work, *(variants or FUSED))


FUSED = ("fused, graph", "fused")


def measured(row: dict[str, Any], name: str) -> Any:
    """A figure of a row; raises MissingError where the profiler gave none."""
    if row[name] is None:
        raise MissingError(f"{row['name']} {row['case']} {name}")
    return row[name]


def at_most(value: float, most: float, unit: str) -> Found:
    """A value that should be small."""
    return f"{value:.3g}{unit}", value <= most


def at_least(value: float, least: float, unit: str) -> Found:
    """A value that should be large."""
    return f"{value:.3g}{unit}", value >= least


def attention_time(work: str, most: float) -> Callable[[Rows], Found]:
    """Microseconds of the operation at C1."""
    return lambda rows: at_most(1e3 * rows.attention("c1 ", work)["p50_ms"], most, " µs")


def layer_speedup(baseline: str, least: float) -> Callable[[Rows], Found]:
    """Forward and backward pass of the layer at C1, together, against a baseline, each as a graph where it has one."""

    def value(rows: Rows) -> Found:
        slow, fast = (
            sum(rows.find("propagation layer", "c1 ", work, *variants)["p50_ms"] for work in ("forward", "backward"))
            for variants in ((f"{baseline}, graph", baseline), FUSED)
        )
        return at_least(slow / fast, least, "×")

    return value


def sdpa_speedup(rows: Rows) -> Found:
    """Forward at C1 against the masked union, a graph against a graph where both are there."""
    for ending in (", graph", ""):
        try:
            slow, fast = (
                rows.attention("c1 ", "forward", way + ending)["p50_ms"] for way in ("SDPA, masked union", "fused")
            )
        except MissingError:
            continue
        return at_least(slow / fast, 1.5, "×")
    raise MissingError("attention forward and SDPA")


def over_limit(work: str, most: float) -> Callable[[Rows], Found]:
    """Time over the limit, the worst of D = 512, 1024, 2048."""

    def value(rows: Rows) -> Found:
        shares = [rows.attention(f"{case} ", work)["share_of_limit"] for case in ("vgg", "c1", "resnet")]
        return at_most(1 / min(shares), most, "×")

    return value


def skipping(rows: Rows) -> Found:
    """Two classes of 21 over a bank of two."""
    wide = rows.find("class skipping", "", "forward", "fused, bank of 21, graph", "fused, bank of 21")
    narrow = rows.find("class skipping", "", "forward", "fused, bank of 2, graph", "fused, bank of 2")
    return at_most(wide["p50_ms"] / narrow["p50_ms"], 1.05, "×")


def pixel_bank(rows: Rows) -> Found:
    """Memory beyond inputs and results, of the larger pass."""
    passes = [rows.attention("pixels-4096 ", work, "fused") for work in ("forward", "backward")]
    return at_most(max(measured(row, "extra_mib") for row in passes), 1023, " MiB")


def pooling(rows: Rows) -> Found:
    """Launches, and the share of the limit, which is the feature read's."""
    row = rows.find("class_pool", "c1 ", "forward", "fused")
    share = rows.find("class_pool", "c1 ", "forward", *FUSED)["share_of_limit"]
    launches = measured(row, "launches")
    return f"{launches} launches, {share:.0%}", launches <= 2 and share >= 0.8


def push(rows: Rows) -> Found:
    """R = 336."""
    row = rows.find("ring_push_", "R 336", "forward", "fused")
    time = 1e3 * rows.find("ring_push_", "R 336", "forward", *FUSED)["p50_ms"]
    text = f"{row['launches']} launches, {time:.3g} µs, {row['syncs']} waits"
    return text, (row["launches"], row["syncs"]) == (1, 0) and time <= 10


def step_speedup(rows: Rows) -> Found:
    """Best way to take the step of VGG16 against the published one in fp32."""
    ways = ("fused, backbone compiled, graph", "fused, backbone compiled", "fused, graph", "fused")
    fast = []
    for way in ways:
        with contextlib.suppress(MissingError):
            fast.append(rows.find("voc12-vgg16", "", "training step", way)["images_per_s"])
    if not fast:
        raise MissingError("a training step of our own")
    slow = rows.find("voc12-vgg16", "", "training step", "published")["images_per_s"]
    return at_least(max(fast) / slow, 3, "×")


def context_share(rows: Rows) -> Found:
    """What the step has beyond the network alone, both as graphs."""
    whole = rows.find("voc12-vgg16", "", "training step", "fused, graph")["p50_ms"]
    alone = rows.find("voc12-vgg16", "", "training step", "network alone, graph")["p50_ms"]
    return at_most(100 * (whole - alone) / whole, 10, " %")


def step_waits(rows: Rows) -> Found:
    """Host waits in one step."""
    waits = measured(rows.find("voc12-vgg16", "", "training step", "fused"), "syncs")
    return f"{waits} waits", waits == 0


GPU: tuple[tuple[str, Callable[[Rows], Found]], ...] = (
    ("attention forward, C1: ≤ 45 µs", attention_time("forward", 45)),
    ("attention backward, C1: ≤ 75 µs", attention_time("backward", 75)),
    ("attention backward with the query's gradient, C1: ≤ 110 µs", attention_time("backward, with dquery", 110)),
    ("layer, forward + backward, C1: ≥ 10× published, eager", layer_speedup("published", 10)),
    ("layer, forward + backward, C1: ≥ 3× published, compiled", layer_speedup("published, compiled", 3)),
    ("attention forward, C1: ≥ 1.5× SDPA without threshold", sdpa_speedup),
    ("forward at D = 512, 1024, 2048: ≤ 1.7× the limit", over_limit("forward", 1.7)),
    ("backward at D = 512, 1024, 2048: ≤ 2× the limit", over_limit("backward", 2)),
    ("2 of 21 classes: ≤ 1.05× a bank of those two", skipping),
    ("81 × 4096 bank: forward and backward in < 1 GiB extra", pixel_bank),
    ("class_pool: ≤ 2 launches, ≥ 80 % of the bandwidth", pooling),
    ("ring_push_, R = 336: 1 launch, ≤ 10 µs, no wait", push),
    ("step, VGG16: ≥ 3× the published images/s", step_speedup),
    ("context branch, masks and losses: ≤ 10 % of the bf16 step", context_share),
    ("step: no host wait", step_waits),
)
CPU = tuple(
    (
        f"hot path on a CPU, {name}: ≥ {least:g}× published",
        lambda rows, name=name, least=least: at_least(
            rows.find("context branch", f"{name} ", "step", "ours")["speedup"], least, "×"
        ),
    )
    for name, least in TARGETS.items()
)


def table(runs: Iterable[dict[str, Any]]) -> str:
    """All targets as a Markdown table, one column per device with results."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_device.setdefault(run["facts"]["device"], []).extend(row for row in run["rows"] if _counts(row))
    gpus = [device for device in by_device if device != "cpu"]
    lines = [f"| target | {' | '.join(gpus) or 'measured'} |", f"|{' --- |' * (1 + max(1, len(gpus)))}"]
    for text, value in GPU:
        cells = [_cell(value, by_device[device]) for device in gpus] or ["waiting for a GPU"]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    for text, value in CPU:
        cell = _cell(value, by_device["cpu"]) if "cpu" in by_device else "not measured"
        lines.append(f"| {text} | {cell} |{' |' * (len(gpus) - 1)}")
    return "\n".join(lines) + "\n"


def _counts(row: dict[str, Any]) -> bool:
    """Operations count in bf16, but for the push, whose bank is fp32."""
    return row["group"] != "ops" or row["dtype"] == "bfloat16" or row["name"] == "ring_push_"


def _cell(value: Callable[[Rows], Found], rows: list[dict[str, Any]]) -> str:
    try:
        text, met = value(Rows(rows))
    except MissingError:
        return "not measured"
    return text if met else f"{text}, **missed**"
