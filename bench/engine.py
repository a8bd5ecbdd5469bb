"""From a task to its rows: build every variant, compare it with the reference, time them interleaved, look inside."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from mcic.kernels.registry import choose
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import DETAILED
from bench.counts import Cost
from bench.results import Piece, Row
from bench.timing import Samples, flush_buffer, measure, ratio

Named = dict[str, Tensor]
"""results by name"""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""largest error (a norm over a norm, against the reference in fp32) of a variant that may be timed"""


@dataclass(frozen=True)
class Variant:
    """Something that computes a task.

    Attributes:
        build: makes the function to time; what it raises becomes the row's note.
        graph: also time it as a replayed CUDA graph: it reads no value on the host, and what one call of `build`
            makes shares no tensor that wants a gradient with another's, whose stream is not the recording one.
    """

    build: Callable[[], Callable[[], Named]]
    graph: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work that several variants compute.

    Attributes:
        name, case, scope, work, dtype: as in `Row`.
        cost: least work, or None where nothing sensible can be counted.
        variants: by name.
        expected: results in fp32 to compare with; None: too large for the reference.
        baseline: variant that speedups refer to.
        detailed: count launches and waits, too.
    """

    name: str
    case: str
    scope: str
    work: str
    dtype: torch.dtype
    cost: Cost | None
    variants: Mapping[str, Variant]
    expected: Callable[[], Named] | None = None
    baseline: str = "published"
    detailed: bool = True

    @property
    def piece(self) -> Piece:
        """As `bench.results.piece` of its rows."""
        return self.name, self.case, self.scope, self.work, _name(self.dtype)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where. rounds, warmup: of the interleaved measurement.
        ceilings: bytes_per_s, and operations per second by dtype name; empty: no limits are given.
        no_graph: variants that are not recorded as graphs.
    """

    device: torch.device
    rounds: int
    warmup: int
    ceilings: Mapping[str, float] = field(default_factory=dict)
    no_graph: Collection[str] = ()


class CaptureError(RuntimeError):
    """Recording `variant` as a CUDA graph failed.

    PyTorch's allocator and random numbers then stay as if the recording went on: nothing more can be measured in this
    process.
    """

    def __init__(self, variant: str, reason: str) -> None:
        super().__init__(f"{variant}: could not be recorded as a CUDA graph: {reason}")
        self.variant = variant


def fastest(operation: str, like: Tensor) -> bool:
    """True where `auto` has something better than the reference; raises ValueError where it has not."""
    if choose(operation, "auto", like.device, like.dtype) == "reference":
        raise ValueError(f"{operation} has no faster backend than the reference on {like.device.type} here")
    return True


def compiled_here(device: torch.device, case: str) -> bool:
    """True where baselines are compiled: on a GPU, for some cases; raises ValueError elsewhere."""
    if device.type != "cuda":
        raise ValueError("measured on a GPU only")
    if case not in DETAILED:
        raise ValueError(f"measured for {', '.join(DETAILED)} only")
    return True


def run(task: Task, settings: Settings) -> list[Row]:
    """The rows of a task, one per variant, and one more for those that replay as a graph.

    Raises:
        CaptureError: one could not be recorded.
    """
    flush = flush_buffer(settings.device)  # before the variants, all of which are held, leave no room
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    exact = _row(task, "exact")
    expected = _attempt(exact, task.expected) if task.expected is not None else None
    for name, variant in task.variants.items():
        row = rows[name] = _row(task, name)
        row.timed = "events" if settings.device.type == "cuda" else "clock"
        ready = _attempt(row, lambda variant=variant, row=row: _ready(variant, row, expected, task, exact.note))
        if ready is None:
            continue
        runs[name] = ready
        if settings.device.type == "cuda":
            _attempt(row, partial(_look_inside, ready, row, settings.device, detailed=task.detailed))
        if variant.graph and settings.device.type == "cuda" and name not in settings.no_graph:
            replayed = rows[_graph(name)] = _row(task, _graph(name))
            replayed.timed = "graph"
            replay = _attempt(replayed, partial(_captured, name, variant.build))
            if replay is not None:
                runs[replayed.variant] = replay

    def failed(name: str, error: Exception) -> None:
        del runs[name]
        rows[name].note = reason(error)

    rounds = {"rounds": settings.rounds, "warmup": settings.warmup}
    samples = measure(runs, settings.device, **rounds, flush=flush, failed=failed) if runs else {}
    for name, taken in samples.items():
        _fill(rows[name], taken, _opponent(rows[name], samples, task.baseline), task, settings)
    runs.clear()
    release(settings.device)
    return list(rows.values())


def release(device: torch.device) -> None:
    """Give back what the last task held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(task: Task, variant: str) -> Row:
    return Row(
        group="ops", name=task.name, case=task.case, scope=task.scope, work=task.work, variant=variant,
        dtype=_name(task.dtype),
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _graph(variant: str) -> str:
    """Name of a variant that is replayed as a graph."""
    return f"{variant}, graph"


def _attempt(row: Row, action: Callable[[], object]) -> object | None:
    """What `action` returns; an error of any kind but a CaptureError is this variant's alone and becomes its note."""
    try:
        return action()
    except CaptureError:
        raise
    except Exception as error:
        row.note = reason(error)
        return None


def reason(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def _ready(variant: Variant, row: Row, expected: Named | None, task: Task, why_not: str) -> Callable[[], object]:
    ready = variant.build()
    found = ready()
    if expected is None:
        row.note = f"not compared: {why_not or 'too large for the reference'}"
        return ready
    errors = {name: deviation(found[name], expected[name]) for name in found if name in expected}
    limit = TOLERANCE[task.dtype] * (1 if task.work == "forward" else 3)
    if not errors or not all(error <= limit for error in errors.values()):  # a NaN is no less than anything
        raise ArithmeticError(f"computes something else: errors {errors}")
    row.error = max(errors.values())
    return ready


def deviation(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, NaN where anything is."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).norm()
    return (difference / expected.to(wide).norm().clamp(min=1e-12)).item()


def _captured(name: str, build: Callable[[], Callable[[], object]]) -> Callable[[], None]:
    """The function as a CUDA graph; built on the capturing stream, where its backward pass then runs too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = build()
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            results = function()
    except Exception as error:
        first = error.__context__ or error  # the end of the recording fails too, and hides what failed in it
        raise CaptureError(name, reason(first)) from error
    graph.replay()
    torch.cuda.synchronize()

    def replay(_: object = (function, results)) -> None:  # held: the graph reads and writes what they hold
        graph.replay()

    return replay


def _look_inside(function: Callable[[], Named], row: Row, device: torch.device, *, detailed: bool) -> None:
    function()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = function()
    torch.cuda.synchronize(device)
    outputs = sum(tensor.nbytes for tensor in results.values())
    row.extra_mib = (torch.cuda.max_memory_allocated(device) - before - outputs) / 2**20
    del results
    if detailed:
        row.launches, row.syncs = launches_and_syncs(function)


def launches_and_syncs(function: Callable[[], object]) -> tuple[int, int]:
    """Kernels that a call puts on the GPU (copies and fills are kernels too) and times the host waits for it."""
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        with record_function("bench::call"):
            function()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.events()
    call = next(e for e in events if e.name == "bench::call" and e.device_type == torch.autograd.DeviceType.CPU)
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("bench::") for e in events)
    # The profiler ends with waits of its own, outside the call; nested calls of the runtime count once each.
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    during = call.time_range
    syncs = sum(e.name in waits and during.start <= e.time_range.start < during.end for e in events)
    return launches, syncs


def _opponent(row: Row, samples: Mapping[str, Samples], baseline: str) -> Samples | None:
    """The baseline that a row is compared with: a graph with the baseline's graph, where that has one."""
    if row.timed == "graph" and _graph(baseline) in samples:
        return samples[_graph(baseline)]
    if row.timed == "graph" and baseline in samples:
        row.note = f"compared with {baseline} without a graph"
    return samples.get(baseline)


def _fill(row: Row, taken: Samples, baseline: Samples | None, task: Task, settings: Settings) -> None:
    row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * taken.quantile(share) for share in (0.2, 0.5, 0.8))
    if baseline is not None:
        times = ratio(baseline, taken)
        row.speedup, row.speedup_p20, row.speedup_p80 = times.of_medians, times.low, times.high
    if task.cost is not None and settings.device.type == "cuda":
        row.gb_per_s = task.cost.bytes / taken.median / 1e9
        row.tflop_per_s = task.cost.operations / taken.median / 1e12
    rate = settings.ceilings.get(_name(task.dtype))
    if task.cost is not None and rate is not None:
        limit = task.cost.seconds(bandwidth=settings.ceilings["bytes_per_s"], rate=rate)
        row.limit_ms, row.share_of_limit = 1e3 * limit, limit / taken.median


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
    """What this device does at best: bytes per second of a large copy (read and written both counted), operations per
    second of a large matrix product by dtype."""
    if device.type != "cuda":
        return {}
    source = torch.randn(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    found = {"bytes_per_s": 2 * source.nbytes / _median(partial(target.copy_, source), device)}
    del source, target
    for dtype in dtypes:
        side = 8192 if dtype.itemsize == 2 else 4096
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[_name(dtype)] = 2 * side**3 / _median(partial(torch.mm, a, b, out=out), device)
    return found


def _median(function: Callable[[], object], device: torch.device) -> float:
    return measure({"": function}, device, rounds=20, warmup=3)[""].median
