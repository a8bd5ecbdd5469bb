"""Everything that only a GPU can show, in one go: build, tests, compute-sanitizer, benches, and a short table.

    python -m bench.gpu [--only build,tests,kernels,memcheck,racecheck,initcheck,ops,step,tune] [--minutes 90]
    python -m bench.gpu --only build,ops -- --resume          flags of the last stage: ops, step or tune
    python -m bench.gpu --only build,tune -- --kernel NAME    such as which kernels a call has time for

Every stage runs whatever became of those before it, and within its own share of the time that is left. A machine that
forgets everything between two calls needs `build` in each. Results go to bench/results/, logs to bench/results/logs;
where $OUT names a folder, one archive of both and of the launch tables goes there, written anew after every stage.
After unpacking that in the checkout, `python -m bench docs` brings the pages up to date. `build` installs the package
alone, and fails where others are missing; where pytest-xdist is installed, several tests run at a time. In a copy
without .git, MCIC_COMMIT says which commit it is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mcic.durable import write_with

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PYTHON = sys.executable


@dataclass(frozen=True)
class Stage:
    """A command, its share of the time, and what it needs in the environment."""

    name: str
    command: tuple[str, ...]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)


INSTALL = f"{PYTHON} -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e ."
CHECK = f"{PYTHON} -c 'from bench import gpu; gpu.check()'"
NEEDED = (
    "PIL", "defusedxml", "docstring_parser", "filelock", "hypothesis", "jinja2", "matplotlib", "numpy", "packaging",
    "pytest", "rich", "safetensors", "scipy", "skimage", "torch", "torchmetrics", "triton", "typeguard", "tyro", "yaml",
)  # fmt: skip
"""what the package, the benches and the tests import"""
LATER = ("bench.ops", "bench.step", "bench.sanitized", "bench.tune", "mcic.cli")
"""modules of the stages after `build`"""
PARALLEL = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
SANITIZED = (PYTHON, "-m", "bench.sanitized")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""every tensor is an allocation of its own, so that one byte beyond it is seen"""


def _sanitizer(tool: str, environment: Mapping[str, str]) -> Stage:
    return Stage(tool, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *SANITIZED), 0.12, environment)


STAGES = (
    Stage("build", ("sh", "-c", f"{INSTALL} && {CHECK}"), 0.15, {"MCIC_BUILD_CUDA": "1"}),
    Stage("tests", (PYTHON, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", *PARALLEL), 0.6),
    Stage("ops", (PYTHON, "-m", "bench", "ops", "--device", "cuda"), 0.6),
    Stage("step", (PYTHON, "-m", "bench", "step", "--device", "cuda"), 0.4),
    Stage("kernels", SANITIZED, 0.05),  # compiles what the sanitizer's runs then find compiled
    _sanitizer("memcheck", UNCACHED),
    _sanitizer("racecheck", {}),
    _sanitizer("initcheck", UNCACHED),
    Stage("tune", (PYTHON, "-m", "bench.tune"), 1.0),
)
DEFAULT = tuple(stage.name for stage in STAGES if stage.name != "tune")  # which takes all the time there is
WITH_FLAGS = ("ops", "step", "tune")
"""stages whose command takes what follows `--`"""


def check() -> None:
    """Print what was built; SystemExit names what the stages after `build` lack."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"missing packages: {', '.join(missing)}")
    for name in LATER:
        importlib.import_module(name)
    print(importlib.import_module("mcic").build_info())


def main(argv: list[str]) -> int:
    """Run the stages; 0 where all of them succeeded."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.split("\n")[0],
        epilog=f"What follows -- is for the last stage, one of {', '.join(WITH_FLAGS)}: -- --resume",
    )  # fmt: skip
    parser.add_argument("--only", default=",".join(DEFAULT), help="stages, joined by commas")
    parser.add_argument("--minutes", type=float, default=90.0, help="for everything together")
    options = parser.parse_args(own)
    known = {stage.name: stage for stage in STAGES}
    unknown = set(options.only.split(",")) - set(known)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    chosen = [stage for stage in STAGES if stage.name in options.only.split(",")]
    if flags and chosen[-1].name not in WITH_FLAGS:
        parser.error(f"{chosen[-1].name} takes no flags, got {' '.join(flags)}: {', '.join(WITH_FLAGS)} do")
    chosen[-1] = replace(chosen[-1], command=(*chosen[-1].command, *flags))
    logs = RESULTS / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    outcome: list[Outcome] = []
    for place, stage in enumerate(chosen):
        left = end - time.monotonic()
        seconds = left * stage.share / sum(other.share for other in chosen[place:])
        outcome.append(run(stage, logs, seconds, verified=_verified(outcome)))
        if os.environ.get("OUT"):
            write_with(Path(os.environ["OUT"]) / "results.tar.gz", pack)
    lines = (f"{one.name:<10} {one.state:<10} {one.seconds:5.0f} s  {one.last}" for one in outcome)
    print("\n" + "\n".join(lines))
    return int(any(one.state != "ok" for one in outcome))


def pack(path: Path) -> None:
    """Write results, logs and launch tables as an archive."""
    found = [each for each in RESULTS.glob("*-*.*") if "cpu" not in each.name]
    found += [*(RESULTS / "logs").glob("*.log"), *(ROOT / "kernels" / "tables").glob("*.json")]
    with tarfile.open(path, "w:gz") as archive:
        for each in sorted(found):
            archive.add(each, each.relative_to(ROOT))


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ok | failed … | timed out | missing | no time, and the last line of its log."""

    name: str
    state: str
    seconds: float
    last: str


def _verified(outcome: list[Outcome]) -> str:
    """What the results say of the tests: how they ended here."""
    tests = next((one for one in outcome if one.name == "tests"), None)
    return "NOT in this call" if tests is None else f"pytest -m gpu: {tests.state}, {tests.last.strip('= ')}"


def run(stage: Stage, logs: Path, seconds: float, *, verified: str) -> Outcome:
    """Run one stage in a process group of its own, for at most so many seconds."""
    command = list(stage.command)
    if stage.name in ("ops", "step"):
        command += ["--verified", verified]
    if seconds < 1:
        return Outcome(stage.name, "no time", 0.0, "")
    if shutil.which(command[0]) is None:
        return Outcome(stage.name, "missing", 0.0, f"{command[0]} is not installed")
    print(f"== {stage.name}: {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    log = logs / f"{stage.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **stage.environment},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            state = "ok" if code == 0 else f"failed {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "timed out"
    lines = log.read_text(errors="replace").strip().split("\n")
    print("\n".join(lines[-40 if state != "ok" or stage.name in ("ops", "step") else -3 :]), flush=True)
    return Outcome(stage.name, state, time.monotonic() - start, lines[-1][:100])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
