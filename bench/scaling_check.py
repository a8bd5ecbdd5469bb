"""The check of `bench.scaling`'s counts on the CPU: ratios of times against ratios of counts.

Ranks are processes of one torchrun. In every round the first one, the first two and all four of them gather, push and
read by turns, while the others wait; so all sizes see the same machine. More ranks than cores take turns on these:
the CPU time of a rank, all its threads together, is what a machine with a core for each would need; the wall clock is
what this one needed. Classes and slots are compared in one process, one after the other in every round.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.documents import ROOT
from bench.results import SYSTEM
from bench.scaling import Setting, costs
from mcic.environment import environment
from mcic.model.memory import MemoryBank
from mcic.model.propagation import Propagation

RANKS = (1, 2, 4)
CLASSES = (20, 80, 320, 1280)
SLOTS = (16, 64, 256, 1024)
ROUNDS, REPEATS = 9, 4
READ = Setting(images=4, size=161, channels=512, element=4, rows_skipped=True)
EXCHANGE = Setting(images=64, size=1, channels=1024, slots=512, element=4)
"""of gather and push: rows enough that the copying shows beside the calls"""

Samples = Sequence[tuple[float, float]]
"""CPU and wall-clock seconds of every round"""


class Branch:
    """The context branch of one rank on random numbers; the bank is full."""

    def __init__(self, setting: Setting, *, backend: str = "auto") -> None:
        random = torch.Generator().manual_seed(0)
        tags = torch.rand(setting.images, setting.classes, generator=random).topk(setting.tags).indices
        self.own = torch.zeros(setting.images, setting.rows, dtype=torch.bool).scatter(1, tags + 1, True)
        self.own[:, 0] = True
        side = round(setting.grid**0.5)
        self.features = torch.randn(setting.images, setting.channels, side, side, generator=random)
        self.features = self.features.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(setting.rows, dtype=torch.int32).where(self.own, -1).flatten()
        vectors = torch.randn(len(labels), setting.channels, generator=random)
        self.rows = (vectors, labels, torch.arange(setting.images).repeat_interleave(setting.rows))
        self.bank = MemoryBank(setting.rows, setting.slots, setting.channels, backend=backend)
        self.bank.entries.normal_(generator=random)
        self.bank.counts += setting.slots
        self.layer = Propagation(setting.channels, dropout=0.0, backend=backend)

    def gather(self, group: dist.ProcessGroup, ranks: int) -> None:
        """What `mcic.distributed.gather_rows` does, among some ranks."""
        gathered = [rows.new_empty((ranks * len(rows), *rows.shape[1:])) for rows in self.rows]
        for all_rows, rows in zip(gathered, self.rows, strict=True):
            dist.all_gather_into_tensor(all_rows, rows, group=group)

    def push(self, ranks: int = 1, *, stores: bool = True) -> Callable[[], None]:
        """The push of the rows of so many ranks; without storing any, what the call itself takes."""
        vectors, labels, ids = (part.repeat(ranks, *[1] * (part.ndim - 1)) for part in self.rows)
        if not stores:
            labels.fill_(-1)
        return lambda: self.bank.push(vectors, labels, ids)

    def read(self) -> None:
        with torch.no_grad():
            self.layer(self.features, self.bank.entries, self.bank.counts, self.own)


def timed(work: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """CPU seconds of this process and wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        work()
    return time.process_time() - cpu, time.perf_counter() - wall


def rank_main(target: Path) -> None:
    """What each process of torchrun does; the first one writes its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    reader, branch, rank, samples = Branch(READ), Branch(EXCHANGE), dist.get_rank(), defaultdict(list)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    pushes = {ranks: (branch.push(ranks), branch.push(ranks, stores=False)) for ranks in RANKS}
    for _ in range(ROUNDS + 1):
        for ranks, group in groups.items():
            dist.barrier()
            if rank < ranks:
                for part, work, repeats in (
                    ("gather", lambda r=ranks, g=group: branch.gather(g, r), REPEATS),
                    ("push", pushes[ranks][0], REPEATS),
                    ("call", pushes[ranks][1], REPEATS),
                    ("read", reader.read, 1),
                ):
                    dist.barrier(group)
                    samples[f"{part} {ranks}"].append(timed(work, repeats))
    if rank == 0:
        target.write_text(json.dumps({key: values[1:] for key, values in samples.items()}))
    dist.barrier()
    dist.destroy_process_group()


def of_ranks() -> list[dict[str, Any]]:
    """Rows of gather, push and read against the number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "times.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={max(RANKS)}"]
        command = [sys.executable, *launcher, "-m", "bench.scaling_check", str(target)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        samples = json.loads(target.read_text())

    rows = []
    for name, setting, sizes, predicted in (
        ("gather", EXCHANGE, RANKS[1:], lambda c: c.gather_received),
        ("push", EXCHANGE, RANKS, lambda c: c.push),
        ("read", READ, RANKS, lambda c: c.read.operations),
    ):
        counted = [predicted(costs(dataclasses.replace(setting, ranks=ranks))) for ranks in sizes]
        taken = [samples[f"{name} {ranks}"] for ranks in sizes]
        if name == "push":
            taken = [less(samples[f"push {ranks}"], samples[f"call {ranks}"]) for ranks in sizes]
        rows.append(row(name, "ranks", sizes, counted, taken))
    return rows


def of_sizes() -> list[dict[str, Any]]:
    """Rows of push and read against classes and slots."""
    torch.set_num_threads(1)
    pushed, rows = dataclasses.replace(EXCHANGE, slots=64), []
    for field, sizes in (("classes", CLASSES), ("slots", SLOTS)):
        for name, base, backend, predicted in (
            ("push", pushed, "auto", lambda c: c.push),
            ("push, reference", READ, "reference", lambda c: c.bank),  # it writes the whole bank anew
            ("read, reference", READ, "reference", lambda c: c.read.operations),
        ):
            settings = [dataclasses.replace(base, **{field: size}) for size in sizes]
            branches = [Branch(setting, backend=backend) for setting in settings]
            samples: list[list[tuple[float, float]]] = [[] for _ in branches]
            for _ in range(ROUNDS + 1):
                for taken, branch in zip(samples, branches, strict=True):
                    taken += _once(name, branch)
            counted = [predicted(costs(setting)) for setting in settings]
            rows.append(row(name, field, sizes, counted, [taken[1:] for taken in samples]))
    return rows


def _once(name: str, branch: Branch) -> Samples:
    if name.startswith("read"):
        return [timed(branch.read)]
    if "reference" in name:
        return [timed(branch.push())]
    return less([timed(branch.push(), REPEATS)], [timed(branch.push(stores=False), REPEATS)])


def less(whole: Samples, call: Samples) -> Samples:
    """Times without those of an empty call, round by round."""
    return [(cpu - no_cpu, wall - no_wall) for (cpu, wall), (no_cpu, no_wall) in zip(whole, call, strict=True)]


def row(
    part: str, against: str, sizes: Sequence[int], counted: Sequence[float], samples: Sequence[Samples],
) -> dict[str, Any]:  # fmt: skip
    """Ratios to the first size, of counts and of median times; the first size's milliseconds."""
    cpu, wall = ([statistics.median(sample[i] for sample in taken) for taken in samples] for i in (0, 1))

    def ratios(values: Sequence[float]) -> list[float]:
        return [round(value / values[0], 3) for value in values]

    return {
        "part": part, "against": against, "sizes": list(sizes), "predicted": ratios(counted), "cpu": ratios(cpu),
        "wall": ratios(wall), "first_ms": {"cpu": round(1e3 * cpu[0], 3), "wall": round(1e3 * wall[0], 3)},
    }  # fmt: skip


def run() -> dict[str, Any]:
    """Measure everything."""
    about = environment()
    rows = [*of_ranks(), *of_sizes()]
    facts = {"command": "python -m bench scaling", "commit": about["git_commit"], "cores": os.cpu_count(),
             **{key: about[key] for key in ("cpu", "python", "torch")}, "platform": SYSTEM}  # fmt: skip
    settings = {"read": dataclasses.asdict(READ), "exchange": dataclasses.asdict(EXCHANGE)}
    return {"facts": facts, "settings": settings, "rows": rows}


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
