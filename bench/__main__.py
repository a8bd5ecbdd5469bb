"""Measure the hot path: `python -m bench [ops|step|hot-path|all] [--device cpu|cuda] [--case …]`.

The tests of what is measured run first, and nothing is measured when they fail. Results go to bench/results/, and the
measured part of docs/kernels.md is written anew (`docs` does only that, from the results that are there). What is
measured takes the place of what was kept of the same, all else stays: cases and dtypes may come one by one.
`python -m bench aot | tune | gpu | ablation | scaling` are tools of their own.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TOOLS = ("aot", "tune", "gpu", "ablation", "scaling")
ROOT = Path(__file__).parent.parent
TESTS = {"cpu": ("test_kernels*", "test_golden*", "test_native*"), "cuda": ("test_triton_[!t]*",)}
"""tests of the operations that run on a device, by file name; a GPU's come on top of the CPU's"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    made.add_argument("what", nargs="?", default="all", choices=("ops", "step", "hot-path", "all", "docs"))
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    made.add_argument("--case", action="append", help="only these cases; may be given several times")
    made.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the operations; default: bf16, CPU fp32")
    made.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    made.add_argument("--rounds", type=int, help="repetitions; default: 30 on a GPU, 15 on a CPU, 10 for steps")
    made.add_argument("--threads", type=int, default=2, help="of the CPU")
    made.add_argument("--tests", nargs="+", help="test files to run first instead of the operations'")
    made.add_argument("--verified", metavar="HOW", help="the tests were just run, in this way; kept in the results")
    made.add_argument("--resume", action="store_true", help="pass over what --out holds of this commit and device")
    made.add_argument("--no-graph", action="append", default=[], metavar="VARIANT", help="not replayed as a CUDA graph")
    made.add_argument("--no-verify", action="store_true", help="while developing: no tests first; kept in the results")
    return made


def main() -> int:
    """Verify, measure, write; the exit status."""
    if sys.argv[1:2] and sys.argv[1] in TOOLS:
        tool = sys.argv.pop(1)
        runpy.run_module(f"bench.{tool}", run_name="__main__", alter_sys=True)
        return 0
    options = parser().parse_args()
    if options.what == "docs":
        from bench import documents

        documents.refresh()
        return 0
    if options.device is None:
        options.device = default_device()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    verified = verify(options)
    if verified is None:
        return 1
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter is no backend to measure
    return measure(options, verified)


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def verify(options: argparse.Namespace) -> str | None:
    """Run the tests: how it was done, or None where one failed."""
    if options.no_verify:
        return "NOT VERIFIED: --no-verify"
    if options.verified:
        return options.verified
    names = TESTS["cpu"] if options.device == "cpu" else (*TESTS["cpu"], *TESTS["cuda"])
    found = sorted(path for name in names for path in (ROOT / "tests").glob(f"{name}.py"))
    files = options.tests or [str(path.relative_to(ROOT)) for path in found]
    command = ["-m", "pytest", *files]  # -q is in the project's options
    print(f"Tests first: python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    tail = "\n".join(done.stdout.strip().split("\n")[-15:])
    if done.returncode:
        print(f"{tail}\n{done.stderr[-2000:]}\nNothing is measured: the tests above must pass first.")
        return None
    print(tail.split("\n")[-1], flush=True)
    return f"pytest {' '.join(files)}: {tail.splitlines()[-1].strip('= ')}"


def measure(options: argparse.Namespace, verified: str) -> int:
    """Measure what was asked for; 1 where a case is unknown or a form of our own failed on a GPU."""
    import torch

    from bench import documents, engine, results

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("This machine shows PyTorch no GPU: use --device cpu")
        return 1
    groups = ("ops", "step", "hot-path") if options.what == "all" else (options.what,)
    if device.type == "cuda":
        groups = tuple(group for group in groups if group != "hot-path")  # a target of the CPU
    failed = any(map(results.is_ours, options.no_graph))
    for group in groups:
        torch.manual_seed(0)
        ceilings: dict[str, float] = {}
        rows = []
        about = results.facts(device, verified=verified, ceilings=ceilings)
        there = results.rows_of_commit(group, about, options.out) if options.resume else []
        try:
            for row in _rows(group, options, device, ceilings, there):
                rows.append(row)
                print(documents.line(row), flush=True)
                results.save(group, rows, about, options.out, complete=False)  # what is there survives a time limit
        except engine.CaptureError as error:
            print(f"{error}\nThis process is of no more use: another one goes on, without that graph", flush=True)
            go_on(error.variant, verified)
        if rows:
            print(f"{group}: {results.save(group, rows, about, options.out, complete=True)}", flush=True)
        ours = [row for row in (*there, *map(vars, rows)) if results.is_ours(row["variant"])]
        failed |= device.type == "cuda" and any(row["p50_ms"] is None for row in ours)
    if options.out.resolve() == results.RESULTS and not options.no_verify:
        documents.refresh()
    return int(failed)


def go_on(variant: str, verified: str) -> NoReturn:
    """Become a process that does the rest of this one's work, without the graph of a variant."""
    command = ["-m", "bench", *sys.argv[1:], "--resume", f"--no-graph={variant}", f"--verified={verified}"]
    sys.stdout.flush()
    os.closerange(3, 2**16)  # with the GPU's files goes what was allocated there
    os.execv(sys.executable, [sys.executable, *command])


def _rows(
    group: str, options: argparse.Namespace, device: object, ceilings: dict[str, float], there: list[dict]
) -> Iterator:  # fmt: skip
    if group == "ops":
        yield from _operation_rows(options, device, ceilings, there)
    elif group == "step":
        from bench import step

        for name in chosen(options, step.CASES, step.CASES):
            done = {row["variant"] for row in there if row["name"] == name}
            yield from step.run(name, device, rounds=options.rounds or 10, warmup=5, done=done)
    else:
        from bench import hotpath

        for name in chosen(options, hotpath.CASES, tuple(hotpath.TARGETS)):
            yield from hotpath.rows(name, rounds=options.rounds or 15)


def _operation_rows(
    options: argparse.Namespace, device: object, ceilings: dict[str, float], there: list[dict]
) -> Iterator:  # fmt: skip
    import torch
    from torch._functorch import config as functorch

    from bench import cases, engine, ops, results

    functorch.donated_buffer = False  # backward passes are timed over and over on one forward pass
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = names[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    ceilings.update(engine.ceilings(device, {dtype, torch.float32}))
    rounds = options.rounds or (30 if device.type == "cuda" else 15)
    settings = engine.Settings(device, rounds=rounds, warmup=3, ceilings=ceilings, no_graph=options.no_graph)
    done = set(map(results.piece, there))
    for thunk in ops.tasks(chosen(options, cases.CONTEXTS, cases.DEFAULT[device.type]), device, dtype):
        for task in thunk():
            if task.piece not in done:
                yield from engine.run(task, settings)
        torch.compiler.reset()
        engine.release(device)


def chosen(options: argparse.Namespace, known: object, default: tuple[str, ...]) -> tuple[str, ...]:
    """The cases to run; with `all`, a case that another group knows is none of this one's."""
    if options.case is None:
        return default
    if options.what != "all" and set(options.case) - set(known):
        unknown = ", ".join(sorted(set(options.case) - set(known)))
        raise SystemExit(f"unknown case {unknown}: {options.what} has {', '.join(known)}")
    return tuple(name for name in options.case if name in known)


if __name__ == "__main__":
    sys.exit(main())
