"""What a run of the benches leaves behind: rows in CSV and JSON, a plot, and the measured part of docs/kernels.md."""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.cases import CONTEXTS
from mcic.durable import write_text, write_with
from mcic.environment import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
GROUPS = ("ops", "step", "hot-path")
SYSTEM = f"{platform.system()}, {platform.machine()}"
"""where a result is from: the kernel's own name says nothing to others"""
Piece = tuple[str, ...]
"""what several variants compute: name, case, scope, work and dtype of their rows"""
MOST_BARS = 100
"""in a plot; a run on a GPU has several times as many rows"""


@dataclass(kw_only=True)
class Row:
    """One variant of one piece of work. What could not be measured is None, and `note` says why.

    Attributes:
        group: ops | step | hot-path. name: of the operation, the network or the case.
        case: sizes, by name. scope: op (alone) | layer (with its projections) | step. work: forward | backward | …
        variant: who computed it. dtype: of the inputs.
        p20_ms, p50_ms, p80_ms: quantiles of the time. timed: clock | events | graph.
        gb_per_s, tflop_per_s: least bytes and operations over p50. limit_ms: what the measured ceilings allow.
        share_of_limit: limit over p50, 1 is perfect.
        extra_mib: peak of the allocator beyond what was there before and beyond the results; of a step, all of it.
        launches, syncs: kernels that the call launched and times the host waited.
        images_per_s: for whole steps. speedup: p50 of the published (else the first) variant over this p50.
        speedup_p20, speedup_p80: quantiles of the same ratio, taken round by round.
        error: against the reference in fp32, a norm over a norm.
        note: why there is no number, or what to know about it.
    """

    group: str
    name: str
    case: str
    scope: str
    work: str
    variant: str
    dtype: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    timed: str = ""
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    limit_ms: float | None = None
    share_of_limit: float | None = None
    extra_mib: float | None = None
    launches: int | None = None
    syncs: int | None = None
    images_per_s: float | None = None
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    error: float | None = None
    note: str = ""


def facts(device: torch.device, *, verified: str, ceilings: dict[str, float]) -> dict[str, Any]:
    """Where, with what and how a run was made."""
    about = environment()
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "commit": about["git_commit"],
        "verified": verified,
        "ceilings": ceilings,
        **{key: about[key] for key in ("python", "torch", "triton", "cuda", "cpu", "threads")},
        "platform": SYSTEM,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def piece(row: Mapping[str, Any]) -> Piece:
    """The piece of work that a row is of."""
    return tuple(row[name] for name in ("name", "case", "scope", "work", "dtype"))


def rows_of_commit(group: str, about: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What is kept of a group, from the same device and commit as the run `about`."""
    runs = _read(_path(group, about, folder))
    return [row for run in runs if run["facts"]["commit"] == about["commit"] for row in run["rows"]]


def save(group: str, rows: list[Row], about: dict[str, Any], folder: Path, *, complete: bool) -> Path:
    """Write `<group>-<device>.json`, `.csv` and, of a complete run, `.png`; returns the JSON file.

    The rows of earlier runs stay, each run with its own facts, but for those that this run has, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(group, about, folder)
    own = [_rounded(row) for row in rows]
    measured = {(piece(row), row["variant"]) for row in own}
    runs = [
        run | {"rows": [row for row in run["rows"] if (piece(row), row["variant"]) not in measured]}
        for run in _read(path)
        if (run["facts"]["date"], run["facts"]["command"]) != (about["date"], about["command"])
    ]
    runs = [*(run for run in runs if run["rows"]), {"facts": about | {"complete": complete}, "rows": own}]
    write_text(path, json.dumps(runs, indent=1) + "\n")
    write_text(path.with_suffix(".csv"), _csv(runs))
    if complete:
        _plot(runs, path.with_suffix(".png"))
    return path


def _path(group: str, about: Mapping[str, Any], folder: Path) -> Path:
    return folder / f"{group}-{about['device'].lower().replace(' ', '-')}.json"


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _csv(runs: Iterable[Mapping[str, Any]]) -> str:
    """The rows, each with date and commit of its run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(field.name for field in fields(Row)), "date", "commit"], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerows(row | {name: run["facts"][name] for name in ("date", "commit")} for row in run["rows"])
    return text.getvalue()


def _rounded(row: Row) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = _shown([Row(**row) for run in runs for row in run["rows"] if row["p50_ms"] is not None])
    if not timed:
        path.unlink(missing_ok=True)
        return
    groups: dict[str, list[Row]] = {}
    for row in timed:
        groups.setdefault(f"{row.name} {row.case}, {row.scope} {row.work}, {row.dtype}", []).append(row)
    heights = [len(group) for group in groups.values()]
    tall = 0.32 * sum(heights) + 0.75 * len(groups) + 0.6  # inches
    place = {"left": 0.26, "right": 0.97, "top": 1 - 0.65 / tall, "bottom": 0.5 / tall}
    place["hspace"] = 0.7 * len(groups) / (0.32 * sum(heights))
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, tall), squeeze=False, gridspec_kw={"height_ratios": heights, **place}
    )
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        names = [row.variant for row in group]
        middle = [row.p50_ms for row in group]
        spread = [[row.p50_ms - row.p20_ms for row in group], [row.p80_ms - row.p50_ms for row in group]]
        colors = ["#1f6f8b" if is_ours(row.variant) else "#b8b8b8" for row in group]
        axis.barh(names, middle, xerr=spread, color=colors, height=0.7, error_kw={"lw": 0.8})
        if group[0].limit_ms is not None:
            axis.axvline(group[0].limit_ms, color="#c0392b", lw=1)
        axis.set_xlim(0, 1.12 * max(row.p80_ms for row in group))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("ms: median, bars from 20 % to 80 %; red: limit by the measured ceilings", fontsize=8)
    origins = (f"{run['facts']['date'][:10]} {(run['facts']['commit'] or 'no commit')[:10]}" for run in runs)
    origin = ", ".join(dict.fromkeys((runs[0]["facts"]["device"], *origins)))
    figure.suptitle(origin, fontsize=9, y=1 - 0.1 / tall)
    write_with(path, lambda partial: figure.savefig(partial, dpi=90, format="png"))
    plt.close(figure)


def _shown(rows: list[Row]) -> list[Row]:
    """All rows where they fit on a page, else those of the first case and those that belong to none."""
    if len(rows) <= MOST_BARS:
        return rows
    others = {row.case.split()[0] for row in rows} & set(CONTEXTS) - {rows[0].case.split()[0]}
    return [row for row in rows if row.case.split()[0] not in others]


def is_ours(variant: str) -> bool:
    """Whether a variant is this package's own way."""
    return variant.startswith(("fused", "ours"))


def load(folder: Path) -> list[dict[str, Any]]:
    """The runs kept in a folder, by group and device."""
    return [run for group in GROUPS for path in sorted(folder.glob(f"{group}-*.json")) for run in _read(path)]


def number(value: float | None, *, unit: str = "") -> str:
    """Three significant digits, or nothing."""
    if value is None:
        return ""
    return f"{value:.0f}{unit}" if abs(value) >= 100 else f"{value:#.3g}{unit}".replace(".%", "%")
