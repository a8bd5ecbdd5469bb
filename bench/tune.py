"""Measure launch configurations on this GPU and keep those that are faster.

    python -m bench.tune                                 every kernel
    python -m bench.tune --kernel class_pool_fwd_kernel  one kernel; the option may be repeated
    python -m bench.tune --dry-run                       changes nothing

Each kernel is timed alone, as its operation launches it at real sizes. From the entry in the table of the GPU's
architecture the search goes to the fastest neighbour on the kernel's grid, one parameter a step, until none is faster;
what spills or does not fit is passed over. The result replaces the entry when it is more than 3 % faster. Run
`python -m bench.aot` and the tests with the marker `gpu` afterwards.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from mcic.kernels import configs
from triton.errors import TritonError
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from .kernel_cases import CASES, Case

GAIN = 0.97
"""largest share of the old time that replaces an entry"""
DTYPES = {"16": torch.bfloat16, "32": torch.float32}

Configuration = dict[str, int]


@dataclass(frozen=True)
class Search:
    """What is tried for an entry.

    Attributes:
        cases: names of the cases that are timed; the geometric mean counts.
        grid: values of each parameter, ascending; what is not named stays as it is.
    """

    cases: tuple[str, ...]
    grid: dict[str, tuple[int, ...]]


def _search(*cases: str, **grid: tuple[int, ...]) -> Search:
    return Search(cases, {"num_warps": (2, 4, 8)} | grid)


_ROWS = ("sparse_attention", "sparse_attention D=512", "sparse_attention D=2048")
_STREAM = ("sparse_attention 81×4096 D=512 θ=1 dq",)
_WIDE = ("sparse_attention 21×4096 D=2048",)
_TILE = (16, 32, 64, 128)
_STAGES = (2, 3, 4, 5)

SEARCHES = {
    "class_pool_fwd_kernel": _search(
        "class_pool", "class_pool D=512", BLOCK_N=_TILE, BLOCK_D=_TILE, num_stages=(2, 3, 4, 5, 6, 8)
    ),
    "class_pool_fwd_winners_kernel": _search("class_pool authors", BLOCK_N=(64, 128, 256, 512)),
    "class_pool_bwd_kernel": _search("class_pool", BLOCK_N=_TILE, BLOCK_D=_TILE),
    "pseudo_masks_fwd_kernel": _search("pseudo_masks", BLOCK_N=_TILE, BLOCK_P=(256, 512, 1024, 2048)),
    "pseudo_masks_peak_kernel": _search("pseudo_masks K=81 321²", BLOCK_P=(1024, 2048, 4096, 8192)),
    "segmentation_losses_fwd_kernel": _search("segmentation_losses", BLOCK_N=_TILE, BLOCK_K=(16, 32, 64)),
    "segmentation_losses_bwd_kernel": _search("segmentation_losses", BLOCK_N=_TILE, BLOCK_K=(16, 32, 64)),
    "sparse_attention_rows_fwd_kernel": _search(
        *_ROWS, BLOCK_N=_TILE, BLOCK_D=_TILE, BLOCK_E=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_rows_bwd_scores_kernel": _search(
        *_ROWS, BLOCK_N=_TILE, BLOCK_D=_TILE, BLOCK_E=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_rows_bwd_partial_kernel": _search(
        *_ROWS, BLOCK_N=_TILE, BLOCK_C=(32, 64, 128, 256), num_stages=_STAGES
    ),
    "sparse_attention_rows_bwd_reduce_kernel": _search(*_ROWS, BLOCK_S=(4, 8, 16, 32), BLOCK_C=(64, 128, 256)),
    "sparse_attention_stream_stats_fwd_kernel": _search(
        *_STREAM, BLOCK_N=_TILE, BLOCK_M=_TILE, BLOCK_D=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_stream_fwd_kernel": _search(*_STREAM, BLOCK_N=_TILE, BLOCK_M=_TILE, num_stages=_STAGES),
    "sparse_attention_stream_fwd_kernel.wide": _search(
        *_WIDE, BLOCK_N=_TILE, BLOCK_M=_TILE, BLOCK_D=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_stream_keys_bwd_kernel": _search(
        *_STREAM, BLOCK_N=_TILE, BLOCK_M=_TILE, BLOCK_D=_TILE, BLOCK_E=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_stream_values_bwd_kernel": _search(
        *_STREAM, BLOCK_N=_TILE, BLOCK_M=_TILE, BLOCK_D=_TILE, num_stages=_STAGES
    ),
    "sparse_attention_stream_query_bwd_kernel": _search(
        *_STREAM, BLOCK_N=_TILE, BLOCK_M=_TILE, BLOCK_D=_TILE, BLOCK_E=_TILE, num_stages=_STAGES
    ),
}
"""grid of each entry of the tables, a kernel's name and perhaps a variant; an entry that is not here stays as it is"""


def neighbours(point: Configuration, grid: dict[str, tuple[int, ...]]) -> Iterator[Configuration]:
    """The configurations of the grid one step of one parameter away."""
    for name, values in grid.items():
        lower = [value for value in values if value < point[name]]
        higher = [value for value in values if value > point[name]]
        for value in (*lower[-1:], *higher[:1]):
            yield point | {name: value}


@contextmanager
def entry(architecture: str, name: str, bits: str, configuration: Configuration) -> Iterator[None]:
    """Within, launches of what the entry is for take this configuration."""
    by_bits = configs.table(architecture)[name]
    before, by_bits[bits] = by_bits[bits], configuration
    try:
        yield
    finally:
        by_bits[bits] = before


@contextmanager
def recorded(kernel: str) -> Iterator[list[Callable[[], object]]]:
    """Within, launches run, and those of `kernel` are collected so that they can be repeated."""
    launches = []
    run = JITFunction.run

    def record(function: JITFunction, *args, **kwargs) -> object:
        compiled = run(function, *args, **kwargs)
        if function.fn.__name__ == kernel:
            if compiled.n_spills:
                raise TritonError(f"{kernel} spills")
            launches.append(lambda: run(function, *args, **kwargs))
        return compiled

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def seconds(kernel: str, case: Case, dtype: torch.dtype) -> float:
    """Median time of what `case` launches of `kernel`."""
    with recorded(kernel) as launches:
        case.run(dtype, torch.device("cuda"))
    if not launches:
        raise RuntimeError(f"the case {case.name!r} does not launch {kernel}")
    return do_bench(lambda: [launch() for launch in launches], return_mode="median") / 1e3


def measure(architecture: str, name: str, bits: str, configuration: Configuration) -> float:
    """Geometric mean of the times of an entry's cases; infinite where the configuration cannot run."""
    cases = {case.name: case for case in CASES}
    try:
        with entry(architecture, name, bits, configuration):
            kernel = name.partition(".")[0]
            times = [seconds(kernel, cases[case], DTYPES[bits]) for case in SEARCHES[name].cases]
    except TritonError:
        return math.inf
    return math.prod(times) ** (1 / len(times))


def tune(architecture: str, name: str, bits: str, *, dry_run: bool) -> None:
    """Search one entry of the table, print what came out and store it."""
    best = old = configs.table(architecture)[name][bits]
    before = time = measure(architecture, name, bits, old)
    tried = [old]
    while True:
        points = [point for point in neighbours(best, SEARCHES[name].grid) if point not in tried]
        times = [measure(architecture, name, bits, point) for point in points]
        tried += points
        if min(times, default=math.inf) >= time:
            break
        time = min(times)
        best = points[times.index(time)]
    print(f"{name} {bits}: {len(tried)} configurations\n  old {before * 1e6:.1f} µs {old}")
    faster = time < GAIN * before
    print(f"  new {time * 1e6:.1f} µs {best}" if faster else "  stays", flush=True)
    if faster and not dry_run:
        configs.store(architecture, name, bits, best)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", action="append", choices=sorted(SEARCHES), help="only this one; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print what would change and change nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "bench.tune measures on a CUDA GPU and none is available here: run it on the GPU to tune", file=sys.stderr
        )
        return 2
    if triton.knobs.runtime.interpret:
        print("bench.tune times compiled kernels: run it without TRITON_INTERPRET in the environment", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    architecture = configs.architecture(device)
    own = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if architecture != own:
        print(f"this GPU uses the table of {architecture}: copy {architecture}.json in {configs.TABLES} to {own}.json "
              "and run again", file=sys.stderr)  # fmt: skip
        return 2
    print(f"{torch.cuda.get_device_name(device)}, table {architecture}")
    for name in options.kernel or SEARCHES:
        for bits in configs.table(architecture)[name]:
            tune(architecture, name, bits, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
