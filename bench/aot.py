"""Compile every Triton kernel as a run would launch it, without a GPU, and look at what came out.

    python -m bench.aot                 the shipped configurations: sm_80 and sm_90, bf16 and fp32, the paper's sizes
    python -m bench.aot --all           every architecture, precision and case
    python -m bench.aot --only pool     the cases with this in their name

The real operations run forward and backward on CPU tensors under a stand-in for Triton's driver: each launch is
compiled and recorded instead of run, so that signatures, specialisations and configurations are those of a run.
Exit status 1: a kernel spills, needs more shared memory than the architecture has, or multiplies 16-bit (or tf32)
blocks without tensor cores. 2: it cannot compile here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
import triton
from mcic.kernels.configs import compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .kernel_cases import CASES, Case

SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
}  # fmt: skip
"""bytes of shared memory that one block may use"""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
SHIPPED = (("sm_80", "sm_90"), ("bf16", "fp32"))


@dataclass
class Row:
    """One compiled kernel.

    Attributes:
        architecture: it was compiled for.
        kernel: its name.
        precision: of the operation it was first launched for.
        configuration: its compile-time parameters.
        registers: of a thread. spilled_bytes: of a thread's stack. shared_bytes: of a block.
        tensor_cores: number of tensor-core instructions by kind; looked for where a product should use them.
        problems: what is wrong with it.
        cases: those that launch it.
        identity: two launches with the same are the same binary.
    """

    architecture: str
    kernel: str
    precision: str
    configuration: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: dict[str, int]
    problems: list[str]
    cases: list[str] = field(default_factory=list)
    identity: str = ""


class StandInDriver:
    """As much of a Triton driver as compiling needs. Triton caches by device number: it is the architecture."""

    def __init__(self, architecture: str) -> None:
        self._capability = int(architecture.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiling_for(architecture: str) -> Iterator[list[CompiledKernel]]:
    """Within, launches compile for `architecture` into the list and run nothing."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args, grid, warmup, **kwargs) -> CompiledKernel:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    triton.runtime.driver.set_active(StandInDriver(architecture))
    JITFunction.run = compile_only
    try:
        with compile_for(architecture):
            yield compiled
    finally:
        JITFunction.run = run


def compile_cases(names: list[str], architecture: str, precision: str) -> tuple[list[Row], list[str]]:
    """Compile what these cases launch: every binary once, with the cases that launch it; and what did not compile."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    rows: dict[str, Row] = {}
    failures = []
    for case in (case for case in CASES if case.name in names):
        with compiling_for(architecture) as compiled:
            try:
                case.run(PRECISIONS[precision], torch.device("cpu"))
            except Exception as error:  # whatever it is, it is reported and the other cases are compiled
                failures.append(f"{case.name}, {architecture}, {precision}: {describe(error)}")
        for kernel in compiled:
            if kernel.hash not in rows:
                rows[kernel.hash] = inspect(kernel, architecture, precision)
            if case.name not in rows[kernel.hash].cases:
                rows[kernel.hash].cases.append(case.name)
    return list(rows.values()), failures


def describe(error: BaseException) -> str:
    """One line about an error's cause; of a compiler's message the last line with words, not the pointer below it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def inspect(kernel: CompiledKernel, architecture: str, precision: str) -> Row:
    """What the compiler made of a kernel."""
    source = kernel.src
    constants = {source.fn.params[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    shown = [f"{param.name}={value}" for param, value in constants.items() if param.is_constexpr]
    shown += [f"warps={kernel.metadata.num_warps}", f"stages={kernel.metadata.num_stages}"]
    registers, spilled = resources(kernel.asm["cubin"])
    should = uses_tensor_cores(kernel.asm["ttir"])
    found = tensor_core_instructions(kernel.asm["cubin"]) if should else {}
    limit = SHARED_LIMIT[architecture]
    problems = [f"spills {spilled} bytes"] if spilled else []
    if kernel.metadata.shared > limit:
        problems.append(f"needs {kernel.metadata.shared} bytes of shared memory, {architecture} has {limit}")
    if should and not found:
        problems.append("multiplies without tensor cores")
    return Row(
        architecture=architecture,
        kernel=kernel.name,
        precision=precision,
        configuration=" ".join(shown),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        tensor_cores=found,
        problems=problems,
        identity=kernel.hash,
    )


def uses_tensor_cores(ttir: str) -> bool:
    """Whether a kernel multiplies blocks in a type that the tensor cores take: 16-bit ones, or fp32 rounded to tf32."""
    products = [line for line in ttir.splitlines() if "tt.dot " in line]
    return any(re.search(r": tensor<[0-9x]+x(bf16|f16)", line) or "= tf32" in line for line in products)


@cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    usage = cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(found[1]), int(found[2])


@cache
def tensor_core_instructions(cubin: bytes) -> dict[str, int]:
    """Number of tensor-core instructions by kind."""
    return dict(Counter(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", cuobjdump(cubin, "--dump-sass"))))


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool that comes with Triton prints about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def collect(chosen: list[Case], architectures: Sequence[str], precisions: Sequence[str], jobs: int
            ) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Compile the chosen cases, an operation, architecture and precision at a time, in `jobs` processes."""
    operations = {case.name.split()[0]: [] for case in chosen}
    for case in chosen:
        operations[case.name.split()[0]].append(case.name)
    tasks = list(itertools.product(operations.values(), architectures, precisions))
    if jobs == 1:
        results = [compile_cases(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
            results = list(executor.map(compile_cases, *zip(*tasks, strict=True)))
    merged: dict[str, Row] = {}
    for row in itertools.chain.from_iterable(rows for rows, _ in results):
        known = merged.setdefault(row.identity, row)
        known.cases += [name for name in row.cases if name not in known.cases]
    rows = sorted(merged.values(), key=lambda row: (row.kernel, row.architecture, row.precision, row.configuration))
    return rows, [failure for _, failures in results for failure in failures]


def table(rows: list[Row]) -> str:
    """The rows for people."""
    lines = [("kernel", "arch", "type", "registers", "spills", "shared", "tensor cores", "case", "configuration")]
    for row in rows:
        cores = " ".join(f"{count} {kind}" for kind, count in row.tensor_cores.items()) or "-"
        numbers = (str(row.registers), str(row.spilled_bytes), str(row.shared_bytes))
        wrong = "".join(f"  ← {problem}" for problem in row.problems)
        where = (row.kernel, row.architecture, row.precision)
        more = f" +{len(row.cases) - 1}" if len(row.cases) > 1 else ""
        lines.append((*where, *numbers, cores, row.cases[0] + more, row.configuration + wrong))
    widths = [max(len(line[column]) for line in lines) for column in range(8)]
    return "\n".join("  ".join([*map(str.ljust, line[:8], widths), line[8]]) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every architecture, precision and case")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("bench.aot compiles kernels: run it without TRITON_INTERPRET in the environment", file=sys.stderr)
        return 2
    start = time.perf_counter()
    architectures, precisions = (tuple(SHARED_LIMIT), tuple(PRECISIONS)) if options.all else SHIPPED
    chosen = [case for case in CASES if (options.all or case.shipped) and options.only in case.name]
    if not chosen:
        print(f"no case has {options.only!r} in its name: {', '.join(case.name for case in CASES)}", file=sys.stderr)
        return 2
    rows, failures = collect(chosen, architectures, precisions, options.jobs)
    print(table(rows))
    bad = [row for row in rows if row.problems]
    for row in bad:
        print(f"FAIL {row.kernel}, {row.architecture}, {row.precision}: {', '.join(row.problems)} ({row.cases[0]})")
    for failure in failures:
        print(f"FAIL {failure}")
    seconds = time.perf_counter() - start
    verdict = f"{len(bad)} with problems, {len(failures)} cases failed" if bad or failures else "none spills, all fit"
    print(f"{len(rows)} kernels for {', '.join(architectures)}: {verdict} ({seconds:.0f} s)")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "failures": failures}, indent=1))
    return 1 if bad or failures else 0


if __name__ == "__main__":
    sys.exit(main())
