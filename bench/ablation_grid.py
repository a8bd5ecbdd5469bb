"""The cells of an ablation: where they lie, what makes them, and the processes that do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.ablation_rows import Row, changed, difference, flag, same_as
from mcic.build import available_memory, choose_device
from mcic.cli.args import parse_train
from mcic.config import Config
from mcic.config_io import load_config

ROOT = Path(__file__).parent.parent
QUIET = ("--run.resume", "auto", "--run.previews", "0", "--run.no-report", "--run.no-tensorboard")
MEMORY_OF_A_CELL = 2 * 2**30
"""bytes that a process on a CPU is taken to need where their number is not given"""
PATIENCE = 300
"""seconds that a process has to save after it was asked to stop"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row with one seed."""

    row: Row
    seed: int

    def __str__(self) -> str:
        return f"{self.row.name}/{self.seed}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Which rows are run, from what, and where their folders lie.

    Attributes:
        preset, flags: what every run's command line begins with.
        baseline: the configuration that they make, not resolved.
        rows: all that there are.
        same: name of a row → name of the one that computes the same and is run in its place.
        runs: folder of the cells.
    """

    preset: str
    flags: tuple[str, ...]
    baseline: Config
    rows: tuple[Row, ...]
    same: dict[str, str]
    runs: Path

    @classmethod
    def of(cls, preset: str, flags: Sequence[str], *, rows: tuple[Row, ...], runs: Path) -> Grid:
        """The grid on a baseline; raises ValueError where a flag of it is wrong."""
        baseline = parse_train([preset, *flags])
        if baseline.data.calibration is not None:
            raise ValueError(
                "--data.calibration sets what rows are compared by: give an ablation the value that was chosen, "
                "--method.background-power, or --method.cam-threshold with the authors' background"
            )
        return cls(preset, tuple(flags), baseline, rows, same_as(rows, baseline), runs)

    def cells(self, wanted: Sequence[Row], seeds: Sequence[int]) -> list[Cell]:
        """The cells of rows as `chosen` gives them, seed by seed, each after the one that it needs."""
        names = {self.same.get(row.name, row.name) for row in wanted}
        return [Cell(row, seed) for seed in dict.fromkeys(seeds) for row in self.rows if row.name in names]

    def stored(self) -> list[Cell]:
        """The cells that are finished, and made as the baseline now is."""
        found = [
            Cell(row, int(folder.name))
            for row in self.rows
            for folder in sorted((self.runs / row.name).glob("*"))
            if folder.name.isdecimal() and row.name not in self.same
        ]
        return [cell for cell in found if self.is_finished(cell) and not self.complaint(cell)]

    def needed(self, cell: Cell) -> Cell | None:
        """The cell that must be finished before."""
        if cell.row.needs is None:
            return None
        name = self.same.get(cell.row.needs, cell.row.needs)
        return Cell(next(row for row in self.rows if row.name == name), cell.seed)

    def origin(self, cell: Cell) -> Cell:
        """The training run from tags that a cell is, or was made from."""
        needed = self.needed(cell)
        return cell if needed is None else self.origin(needed)

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies, whatever its kind."""
        return self.runs / cell.row.name / str(cell.seed)

    def is_finished(self, cell: Cell) -> bool:
        """Whether its result is there, and that of the cell it was made from."""
        needed = self.needed(cell)
        result = "masks/masks.json" if cell.row.kind == "masks" else "summary.json"
        return (self.folder(cell) / result).is_file() and (needed is None or self.is_finished(needed))

    def command(self, cell: Cell, *, workers: int) -> list[str]:
        """What makes a cell, or goes on with it; to be called in the root of the repository.

        Args:
            cell: to be made.
            workers: loader processes of a run on files, unless the baseline says how many.
        """
        folder, needed = self.folder(cell), self.needed(cell)
        kept = ("--run.dir", str(folder), *QUIET)
        if needed is None:
            own = [*cell.row.flags, *flag("train.seed", cell.seed)]
            if self.baseline.data.workers is None and self.baseline.data.name != "shapes":
                own += flag("data.workers", workers)
            return [sys.executable, "train.py", self.preset, *self.flags, *own, *kept]
        mcic = [sys.executable, "-c", "import sys; from mcic.cli import main; sys.exit(main())"]
        masks = (folder if cell.row.kind == "masks" else self.folder(needed)) / "masks"
        origin = str(self.folder(self.origin(cell)))
        if cell.row.kind == "masks":
            return [*mcic, "masks", origin, "--out", str(masks), *cell.row.flags]
        return [*mcic, "retrain", origin, "--data.masks", str(masks), *kept]

    def complaint(self, cell: Cell) -> str | None:
        """What a stored cell, or the run it was made from, was trained with that is no longer asked for."""
        run = self.origin(cell)
        stored = self.folder(run) / "config.yaml"
        if not stored.is_file():
            return None
        wanted = changed(self.baseline, {**run.row.changes, "train.seed": run.seed})
        try:
            return difference(load_config(stored), wanted)
        except ValueError as error:
            return f"other fields: {error}"

    def discard(self, cell: Cell) -> None:
        """Remove the run that a cell was made from, and all that was made from it."""
        run = self.origin(cell)
        for row in self.rows:
            made = Cell(row, cell.seed)
            if row.name not in self.same and self.origin(made) == run and self.folder(made).exists():
                shutil.rmtree(self.folder(made))


@dataclass(frozen=True, slots=True)
class Machine:
    """How many processes run at a time, with how many threads and loader processes, and on which GPUs (none: CPU)."""

    jobs: int
    threads: int
    workers: int
    gpus: tuple[str, ...]

    @classmethod
    def fit(cls, device: str, *, jobs: int | None, cells: int) -> Machine:
        """One process for each GPU; on a CPU as many as there are cores and `MEMORY_OF_A_CELL`.

        The processes share the cores, unless OMP_NUM_THREADS gives each fewer: where something else runs on a core,
        threads that wait for each other there are many times as slow as one thread.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = _gpus(device)
        if jobs is None:
            on_cpu = min(cores, available_memory(choose_device("cpu")) // MEMORY_OF_A_CELL)
            fitting = 1 if device.startswith("cuda:") else len(gpus) or on_cpu
            jobs = max(1, min(fitting, cells))
        share, given = max(1, cores // jobs), os.environ.get("OMP_NUM_THREADS", "")
        threads = min(share, int(given)) if given.isdecimal() and int(given) else share
        return cls(jobs, threads, min(8, share - 1), gpus)

    def environment(self, slot: int) -> dict[str, str]:
        """Of the process in one of the `jobs` places."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return os.environ | threads | gpu


def _gpus(device: str) -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them; none where runs are to be on the CPU, or the flags name one GPU for all."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return ()
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(named.split(","))
    return tuple(map(str, range(torch.cuda.device_count())))


@dataclass(slots=True)
class Process:
    """A cell that is being made."""

    cell: Cell
    slot: int
    process: subprocess.Popen
    started: float


class Runner:
    """Makes cells in processes of their own.

    Args:
        grid: says how.
        machine: says how many at a time.
        lock: a locked file; the processes hold it too, should this one be killed.
        keep: also keep the checkpoints that no row needs.
    """

    def __init__(self, grid: Grid, machine: Machine, lock: IO, *, keep: bool) -> None:
        self.grid, self.machine, self.lock, self.keep = grid, machine, lock, keep
        self.running: list[Process] = []
        self.failures: dict[Cell, str] = {}

    def run(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        """Make the cells that are not finished; returns why some could not be made.

        Raises:
            KeyboardInterrupt: after its processes have saved and ended.
        """
        waiting = [cell for cell in cells if not self.grid.is_finished(cell)]
        done, total = len(cells) - len(waiting), len(cells)
        try:
            while waiting or self.running:
                for cell in self._startable(waiting):
                    waiting.remove(cell)
                    self._start(cell)
                for ended in [each for each in self.running if each.process.poll() is not None]:
                    self.running.remove(ended)
                    done += 1
                    print(f"[{done}/{total}] {ended.cell}: {self._end(ended)}", flush=True)
                for cell in [cell for cell in waiting if self.grid.needed(cell) in self.failures]:
                    waiting.remove(cell)
                    self.failures[cell] = f"needs {self.grid.needed(cell)}, which failed"
                time.sleep(0.1)
        finally:
            self._stop()
        return self.failures

    def _startable(self, waiting: Sequence[Cell]) -> list[Cell]:
        """The next ones for which there is a place and whose need is met."""
        free = self.machine.jobs - len(self.running)
        ready = [cell for cell in waiting if not (need := self.grid.needed(cell)) or self.grid.is_finished(need)]
        return ready[:free]

    def _start(self, cell: Cell) -> None:
        folder = self.grid.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.machine.jobs)) - {each.slot for each in self.running})
        command = self.grid.command(cell, workers=self.machine.workers)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.machine.environment(slot), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, pass_fds=(self.lock.fileno(),), start_new_session=True,
            )  # fmt: skip
        self.running.append(Process(cell, slot, process, time.monotonic()))

    def _end(self, ended: Process) -> str:
        """What to say of a process that ended."""
        folder = self.grid.folder(ended.cell)
        if ended.process.returncode or not self.grid.is_finished(ended.cell):
            said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            self.failures[ended.cell] = f"exit status {ended.process.returncode}: {last}"
            return f"FAILED, {self.failures[ended.cell]}"
        needed = {self.grid.same.get(row.needs, row.needs) for row in self.grid.rows}
        if not self.keep and ended.cell.row.name not in needed:
            for checkpoint in (folder / "checkpoints").glob("step-*"):
                shutil.rmtree(checkpoint)
        return f"{time.monotonic() - ended.started:.0f} s"

    def _stop(self) -> None:
        """Ask what runs to save and end; what does not is killed."""
        for each in self.running:
            each.process.terminate()
        deadline = time.monotonic() + PATIENCE
        try:
            for each in self.running:
                each.process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for each in self.running:
                each.process.kill()
