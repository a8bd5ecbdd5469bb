"""Everything that only a GPU can show, in one go: build, tests, compute-sanitizer, benches, and a short table.

    python -m bench.gpu [--only build,tests,memcheck,racecheck,ops,step] [--minutes 9]

Every stage runs whatever became of those before it, and within its own share of the time. Results go to
bench/results/, logs to bench/results/logs; where $OUT names a folder, logs go there, with all results in one archive.
After unpacking that in bench/results/, `python -m bench docs` brings the pages up to date. The tests need the packages
of the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PYTHON = sys.executable
TESTED = "pytest -m gpu"


@dataclass(frozen=True)
class Stage:
    """A command and the share of the time that it may take."""

    name: str
    command: tuple[str, ...]
    share: float


SANITIZED = (PYTHON, "-m", "bench.sanitized")
STAGES = (
    Stage("build", (PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."), 0.2),
    Stage("tests", (PYTHON, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors"), 0.3),
    Stage("ops", (PYTHON, "-m", "bench", "ops", "--device", "cuda"), 0.35),
    Stage("step", (PYTHON, "-m", "bench", "step", "--device", "cuda"), 0.25),
    Stage("memcheck", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *SANITIZED), 0.15),
    Stage("racecheck", ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *SANITIZED), 0.15),
)


def main() -> int:
    """Run the stages; 0 where all of them succeeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(stage.name for stage in STAGES), help="stages, joined by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    options = parser.parse_args()
    logs = Path(os.environ.get("OUT") or RESULTS / "logs")
    logs.mkdir(parents=True, exist_ok=True)
    chosen = options.only.split(",")
    end = time.monotonic() + 60 * options.minutes
    outcome: list[tuple[str, str, float, str]] = []
    for stage in STAGES:
        if stage.name in chosen:
            outcome.append(run(stage, logs, end, 60 * options.minutes, passed={o[0] for o in outcome if o[1] == "ok"}))
    if os.environ.get("OUT"):
        with tarfile.open(logs / "results.tar.gz", "w:gz") as archive:
            for path in sorted(RESULTS.glob("*-*.*")):
                if "cpu" not in path.name:
                    archive.add(path, path.name)
    print(
        "\n" + "\n".join(f"{name:<10} {state:<10} {seconds:5.0f} s  {last}" for name, state, seconds, last in outcome)
    )
    return int(any(state != "ok" for _, state, _, _ in outcome))


def run(stage: Stage, logs: Path, end: float, total: float, passed: set[str]) -> tuple[str, str, float, str]:
    """Run one stage in a process group of its own: (name, ok | failed | timed out | …, seconds, last line)."""
    command = list(stage.command)
    if stage.name in ("ops", "step") and "tests" in passed:
        command += ["--verified", TESTED]  # else the bench runs the operations' own tests, and refuses on red
    limit = min(stage.share * total, end - time.monotonic())
    if limit < 1:
        return stage.name, "no time", 0.0, ""
    if shutil.which(command[0]) is None:
        return stage.name, "missing", 0.0, f"{command[0]} is not installed"
    print(f"== {stage.name}: {' '.join(command)} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    log = logs / f"{stage.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            state = "ok" if code == 0 else f"failed {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = "timed out"
    lines = log.read_text(errors="replace").strip().split("\n")
    print("\n".join(lines[-40 if state != "ok" or stage.name in ("ops", "step") else -3 :]), flush=True)
    return stage.name, state, time.monotonic() - start, lines[-1][:100]


if __name__ == "__main__":
    sys.exit(main())
