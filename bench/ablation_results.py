"""What the cells of an ablation measured: one line a cell in CSV, a table over the seeds, and plots.

Differences to the baseline are paired: taken seed by seed, then averaged. Deviations are those of a sample (n - 1).
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ablation_rows import BASELINE, GROUPS, Row
from mcic.durable import write_text, write_with
from mcic.evaluate import MASK_NAMES
from mcic.runfolder import finite, read_document, read_run

QUALITY = ("val/miou", "val/miou_tags", "val/miou_context")
MASKS = tuple(f"train/mask_{what}_{name}" for name in MASK_NAMES for what in ("miou", "coverage"))
WRITTEN = ("masks/miou", "masks/labelled")
COST = ("seconds", "images_per_second", "memory_gib")
COLUMNS = ("group", "row", "seed", "epochs", *QUALITY, *MASKS, *WRITTEN, *COST, "commit", "machine")
"""of the CSV: IoUs, coverages and labelled in percent, seconds of training, largest memory in GiB"""

SCORE = "val/miou"
"""what rows are compared by"""

HEADINGS = {
    SCORE: "network", "val/miou_tags": "given tags", "val/miou_context": "with memory", "train/mask_miou_cam": "M",
    "train/mask_miou_seg": "M' rule on s", "train/mask_miou_context": "M'", "train/mask_miou_merged": "M''",
    "masks/miou": "written masks", "seconds": "s", "memory_gib": "GiB",
}  # fmt: skip
"""of the table's columns; a mask's coverage stands behind its mIoU"""

_COVERAGE = {f"train/mask_miou_{name}": f"train/mask_coverage_{name}" for name in MASK_NAMES} | {WRITTEN[0]: WRITTEN[1]}


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean of `count` values and their sample standard deviation, None of a single one."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return self.text()

    def text(self, *, signed: bool = False) -> str:
        """`72.1 ± 0.8`, with its sign where it is a difference."""
        mean = f"{self.mean:{'+' if signed else ''}.1f}".replace("-", "−")
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.1f}"


def spread(values: Iterable[float]) -> Spread | None:
    """Of the values; None of none."""
    values = list(values)
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired(row: Mapping[int, float], baseline: Mapping[int, float]) -> Spread | None:
    """Of the differences at the seeds that both have."""
    return spread(value - baseline[seed] for seed, value in row.items() if seed in baseline)


def read_cell(row: Row, seed: int, folder: Path) -> dict[str, Any]:
    """The columns of a finished cell; what it did not measure is None."""
    cell: dict[str, Any] = dict.fromkeys(COLUMNS) | {"group": row.group, "row": row.name, "seed": seed}
    if row.kind == "masks":
        measured = read_document(folder / "masks" / "masks.json", dict)["measured"]
        return cell | {"masks/miou": finite(measured, "mask_miou"), "masks/labelled": finite(measured, "labelled")}
    run = read_run(folder)
    summary = {name: finite(run.summary, name) for name in (*QUALITY, *MASKS, *COST[:2])}
    peaks = [peak for line in run.metrics if (peak := finite(line, "memory_gib")) is not None]
    devices = run.env["cuda_devices"] if run.summary["device"].startswith("cuda") else []
    return cell | summary | {
        "epochs": run.summary["epochs"],
        "memory_gib": max(peaks, default=None),
        "commit": run.env["git_commit"],
        "machine": devices[0]["name"] if devices else run.env["cpu"],
    }  # fmt: skip


def csv_text(cells: Iterable[Mapping[str, Any]]) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _rounded(value) for name, value in cell.items()} for cell in cells)
    return text.getvalue()


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Table:
    """The cells by row and seed.

    Args:
        cells: of `read_cell`.
        rows: all rows, in their order.
        same: name of a row → name of the one that computes the same, under which its cells are found.
    """

    def __init__(self, cells: Iterable[Mapping[str, Any]], rows: Sequence[Row], same: Mapping[str, str]) -> None:
        self.cells: dict[str, dict[int, Mapping[str, Any]]] = {}
        for cell in cells:
            self.cells.setdefault(cell["row"], {})[cell["seed"]] = cell
        self.same = same
        self.rows = [row for row in rows if same.get(row.name, row.name) in self.cells]

    def values(self, name: str, column: str) -> dict[int, float]:
        """Seed → value of the cells of a row that have one."""
        cells = self.cells.get(self.same.get(name, name), {})
        return {seed: cell[column] for seed, cell in sorted(cells.items()) if cell[column] is not None}

    def difference(self, name: str) -> Spread | None:
        """A row's score against the baseline's, paired by seed."""
        return paired(self.values(name, SCORE), self.values(BASELINE, SCORE))

    def in_group(self, group: str) -> list[Row]:
        """The rows of a group that have cells of their own."""
        return [row for row in self.rows if row.group == group and row.name not in self.same]

    def markdown(self, *, title: str, command: str) -> str:
        """The page: a table for each group, each with the baseline on top."""
        parts = [f"# {title}\n", f"`{command}`\n", self._origin()]
        for group, heading in GROUPS.items():
            if self.in_group(group):
                parts += [f"## {heading}\n", self._group(group)]
        equal: dict[str, list[str]] = {}
        for row in self.rows:
            if row.name in self.same:
                equal.setdefault(self.same[row.name], []).append(f"`{row.name}`")
        for name, others in equal.items():
            parts.append(f"The same as `{name}` here, and not run again: {', '.join(others)}.\n")
        return "\n".join(parts)

    def _origin(self) -> str:
        found = [cell for cells in self.cells.values() for cell in cells.values()]
        facts = [
            f"{name}: {', '.join(sorted({str(cell[key]) for cell in found if cell[key] is not None}))}"
            for name, key in (("Epochs", "epochs"), ("Machine", "machine"), ("Commit", "commit"))
        ]
        return (
            f"{'. '.join(facts)}. mIoU and coverage in percent: mean ± sample standard deviation over the seeds; the "
            "difference to the baseline is paired by seed. Behind a mask's mIoU, whose ignored pixels count as "
            "background, stands the share of pixels that it labels.\n"
        )

    def _group(self, group: str) -> str:
        rows = [row for row in self.rows if row.name == BASELINE] + self.in_group(group)
        shown = [name for name in HEADINGS if any(self.values(row.name, name) for row in rows)]
        headings = [HEADINGS[name] for name in shown]
        if SCORE in shown:
            headings.insert(1, "against baseline")
        lines = [["row", "what", *headings, "seeds"], ["---", "---", *["--:"] * (len(headings) + 1)]]
        for row in rows:
            values = [self._entry(row, name) for name in shown]
            if SCORE in shown:
                difference = None if row.name == BASELINE else self.difference(row.name)
                values.insert(1, difference.text(signed=True) if difference else "–")
            lines.append([f"`{row.name}`", row.about, *values, str(len(self.cells[row.name]))])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _entry(self, row: Row, column: str) -> str:
        found = spread(self.values(row.name, column).values())
        if found is None:
            return "–"
        if column == "seconds":
            return f"{found.mean:.0f}"
        if column == "memory_gib":
            return f"{found.mean:.2f}"
        covered = spread(self.values(row.name, _COVERAGE[column]).values()) if column in _COVERAGE else None
        return f"{found} ({covered.mean:.0f})" if covered else str(found)


def lost(out: Path, cells: Iterable[tuple[str, int]]) -> list[str]:
    """The cells of the `results.csv` in a folder, `row/seed`, that are not among `cells`."""
    path = out / "results.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        held = [(line["row"], int(line["seed"])) for line in csv.DictReader(file)]
    kept = set(cells)
    return [f"{row}/{seed}" for row, seed in held if (row, seed) not in kept]


def write(table: Table, out: Path, *, title: str, command: str, runs: Path) -> None:
    """Write `results.csv`, `table.md`, `plot-differences.svg` and, of runs that evaluate on the way, `plot-epochs.svg`.

    Args:
        table: what was measured.
        out: folder for the files, made if need be.
        title: of page and plots.
        command: that makes them again.
        runs: folder of the cells, `<row>/<seed>`.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells = [table.cells[row.name][seed] for row in table.rows if row.name not in table.same
             for seed in sorted(table.cells[row.name])]  # fmt: skip
    write_text(out / "results.csv", csv_text(cells))
    write_text(out / "table.md", table.markdown(title=title, command=command))
    _plot_differences(table, out / "plot-differences.svg", title)
    _plot_epochs(table, out / "plot-epochs.svg", title, runs)


def _plot_differences(table: Table, path: Path, title: str) -> None:
    """Every row's score against the baseline's as a dot with its deviation, a panel for each group."""
    panels = {
        heading: [(row, difference) for row in table.in_group(group) if (difference := table.difference(row.name))]
        for group, heading in GROUPS.items()
    }
    panels = {heading: points for heading, points in panels.items() if points}
    if not panels:
        path.unlink(missing_ok=True)
        return
    plt = _pyplot()
    heights = [len(points) + 1 for points in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(8, 0.24 * sum(heights) + 1.2), layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (heading, points) in zip(axes[:, 0], panels.items(), strict=True):
        axis.axvline(0, color="#888888", lw=0.8)
        for place, (_, point) in enumerate(points):
            axis.errorbar(
                point.mean, place, xerr=point.deviation, fmt="o", ms=4, capsize=2, lw=1, color="#1f6f8b",
                mfc="white" if point.deviation is None else "#1f6f8b",
            )  # fmt: skip
        axis.set_yticks(range(len(points)), [row.name for row, _ in points], fontsize=7)
        axis.set_ylim(len(points) - 0.5, -0.5)
        axis.set_title(heading, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", lw=0.3)
    label = "mIoU of the network against the baseline, points: mean and sample deviation over seeds; hollow: one seed"
    axes[-1, 0].set_xlabel(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _plot_epochs(table: Table, path: Path, title: str, runs: Path) -> None:
    """The score during training, mean over the seeds, of baseline and of the group `memory`."""
    curves = {}
    for row in table.rows:
        if row.name not in table.same and (row.name == BASELINE or row.group == "memory"):
            curve = _curve(runs / row.name / str(seed) for seed in table.cells[row.name])
            if len(curve) > 1:
                curves[row.name] = curve
    if not curves:
        path.unlink(missing_ok=True)
        return
    figure, axis = _pyplot().subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axis.plot(list(curve), list(curve.values()), marker="o", ms=3, lw=2 if name == BASELINE else 1, label=name)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_ylabel("mIoU of the network, percent", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(lw=0.3)
    axis.legend(fontsize=7)
    axis.set_title(title, fontsize=9)
    _save(figure, path)


def _curve(folders: Iterable[Path]) -> dict[int, float]:
    """Epoch, from 1 → mean score over the runs, where all of them were evaluated."""
    runs = [
        {
            line["epoch"] + 1: score
            for line in read_run(folder).evaluations
            if (score := finite(line, SCORE)) is not None
        }
        for folder in folders
    ]
    common = sorted(set.intersection(*map(set, runs)))
    return {epoch: math.fsum(run[epoch] for run in runs) / len(runs) for epoch in common}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mcic"  # equal figures are equal files
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    write_with(path, lambda partial: figure.savefig(partial, format="svg", metadata={"Date": None}))
    _pyplot().close(figure)
