"""`comparison.html`: several runs on one page, in one file that loads nothing from outside.

The first run is the one that the others are held against: differences are to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mcic.charts import Line, line_chart, number
from mcic.measures import EVALUATION_FIGURES, MASKS, NETWORK, SCORES, TRAINING_FIGURES, Figure, Measure
from mcic.report_gallery import build_gallery
from mcic.report_page import classes_of, confusion_svg, duration, render, require_page, setting_text, write_page
from mcic.runfolder import RunFolder, column, finite, read_run, steps

_COLORS = 8  # custom properties run-0, run-1, … of the style sheet; then they come again, dashed
_UNCOMPARED = {("run", "dir")}  # settings that name a run instead of making it


def write_comparison(runs: Sequence[Path], *, out: Path) -> Path:
    """Write a page that shows runs side by side.

    Args:
        runs: two or more run folders, see `mcic.report.write_report`.
        out: the page.

    Returns:
        Its path.

    Raises:
        ValueError: a folder is no run folder or is named twice, a file cannot be read, or `out` is no page of ours.
    """
    path = require_page(Path(out))
    places = [Path(run).resolve() for run in runs]
    if len(set(places)) < max(2, len(places)):
        raise ValueError(f"a comparison needs two or more different runs, got {', '.join(map(str, runs)) or 'none'}")
    folders = [read_run(Path(run)) for run in runs]
    return write_page(path, render("report_comparison.html", _context(folders, _names(places))))


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _context(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any]:
    colors = [f"run-{place % _COLORS}" for place in range(len(runs))]
    dashed = [place >= _COLORS for place in range(len(runs))]
    shared = set.intersection(*({entry["id"] for entry in run.examples} for run in runs))
    keys = list(zip(names, colors, dashed, strict=True))
    figures = _figures(EVALUATION_FIGURES, [run.evaluations for run in runs], keys)
    figures += _figures(TRAINING_FIGURES, [run.metrics for run in runs], keys)
    settings = _settings(runs)
    confusions = [(name, confusion_svg(run.summary)) for run, name in zip(runs, names, strict=True)]
    return {
        "runs": [
            {"name": name, "color": color, "dashed": dash, "preset": run.config.get("preset") or "run"}
            for run, name, color, dash in zip(runs, names, colors, dashed, strict=True)
        ],
        "verdict": _verdict(runs, names),
        "notes": _notes(runs, names),
        "scores": _scores(runs),
        "differing": [row for row in settings if row["differs"]],
        "common": {row["name"]: row["values"][0] for row in settings if not row["differs"]},
        "figures": figures,
        "per_class": _per_class(runs),
        "confusions": [(name, svg) for name, svg in confusions if svg is not None],
        "gallery": build_gallery(runs, names, colors) if shared else None,
    }


def _verdict(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    scores = {name: finite(run.summary, NETWORK.key) for run, name in zip(runs, names, strict=True)}
    known = sorted((score, name) for name, score in scores.items() if score is not None)[::-1]
    if len(known) < 2:
        return "The network alone was not measured in two of these runs, so they cannot be ranked."
    (best, winner), (second, other) = known[:2]
    if best - second < 0.05:
        return f"On the validation images {winner} and {other} are level at {best:.1f} mIoU, network alone."
    return (
        f"On the validation images the network of {winner} is best with {best:.1f} mIoU, {best - second:.1f} points "
        f"above {other}."
    )


def _notes(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """What stands in the way of a fair comparison, a sentence each."""
    notes = [
        f"{name} is unfinished: it has no summary.json."
        for run, name in zip(runs, names, strict=True)
        if not run.summary
    ]
    finished = [run for run in runs if run.summary]
    if len({(str(run.setting("data", "name")), str(run.setting("data", "root"))) for run in runs}) > 1:
        notes.append("The runs were trained on different data.")
    if len({str(run.summary.get("classes")) for run in finished}) > 1:
        notes.append("The runs have different classes: their scores are means over different things, and one colour "
                     "may stand for two classes in the pictures.")  # fmt: skip
    if len({str(run.summary.get("protocol")) for run in finished}) > 1:
        notes.append("The runs were evaluated under different protocols: compare their scores with care.")
    used = [name for run, name in zip(runs, names, strict=True) if run.summary.get("ground_truth_used")]
    if used:
        notes.append(f"Ground-truth masks trained or tuned {', '.join(used)}.")
    return notes


def _scores(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row for every score that any run has: name, where, and its value and difference to the first run in each."""
    rows = []

    def add(name: str, where: str, key: str, text: Callable[[float], str], *, rank: bool = False) -> None:
        values = [finite(run.summary, key) for run in runs]
        if any(value is not None for value in values):
            rows.append({"name": name, "where": where, "values": _against_first(values, text, rank=rank)})

    for measure in SCORES:
        add(measure.name, measure.where, measure.key, "{:.1f}".format, rank=True)
    for mask in MASKS:
        add(f"{mask.name} covers", "percent of the pixels", mask.coverage, "{:.1f}".format)
    add("Speed", "training images per second", "images_per_second", number)
    add("Training time", "", "seconds", duration)
    return rows


def _against_first(values: Sequence[float | None], text: Callable[[float], str], *, rank: bool) -> list[dict[str, Any]]:
    """`rank`: values in points of percent, the more the better: with their difference, and the best is marked."""
    first, known = values[0], {round(value, 1) for value in values if value is not None}
    best = max(known) if rank and len(known) > 1 else None
    return [
        {
            "text": "–" if value is None else text(value),
            "difference": value - first if rank and place and None not in (value, first) else None,
            "best": None not in (value, best) and round(value, 1) == best,
        }
        for place, value in enumerate(values)
    ]


def _settings(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row for every setting of any run: "group.name", its values as text, whether they differ, and from the first."""
    keys = dict.fromkeys(
        (group, name)
        for run in runs
        for group, settings in run.config.items()
        if isinstance(settings, dict)
        for name in settings
    )
    rows = [
        {
            "name": f"{group}.{name}".replace("_", "-"),
            "raw": [run.setting(group, name) for run in runs],
        }
        for group, name in keys
        if (group, name) not in _UNCOMPARED
    ]
    for row in rows:
        raw = row.pop("raw")
        row["values"] = [setting_text(value) for value in raw]
        row["changed"] = [value != raw[0] for value in raw]
        row["differs"] = any(row["changed"])
    return rows


def _figures(
    figures: Sequence[Figure], rows: Sequence[list[dict[str, Any]]], keys: Sequence[tuple[str, str, bool]]
) -> list[dict[str, Any]]:
    """A chart for every curve that any run has; `keys` are name, colour and dash of each run's line."""
    x = np.unique(np.concatenate([steps(of_run) for of_run in rows]))
    curves = [(figure, curve) for figure in figures for curve in figure.curves]
    charts = []
    for figure, curve in curves:
        lines = []
        for of_run, (name, color, dashed) in zip(rows, keys, strict=True):
            values = np.full(len(x), math.nan)
            values[np.searchsorted(x, steps(of_run))] = column(of_run, curve.key)
            lines.append(Line(name, color, values, dashed))
        lines = [line for line in lines if np.isfinite(line.values).any()]
        if lines:
            alone = len(figure.curves) == 1
            title = figure.title if alone else f"{figure.title}: {curve.name}"
            legend = [(line, line.values[np.isfinite(line.values)][-1]) for line in lines]
            svg = Markup(line_chart(x, lines, label=title, top=figure.top))
            charts.append({"title": title, "note": figure.note if alone else "", "svg": svg, "legend": legend})
    return charts


def _per_class(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """For every measure that any run has by class: the measure and its rows, class and one IoU for each run."""
    classes = {entry["name"]: entry for run in reversed(runs) for entry in classes_of(run.summary)}
    order = dict.fromkeys(entry["name"] for run in runs for entry in classes_of(run.summary))
    tables = []
    for measure in (NETWORK, *MASKS):
        scores = [_by_class(run, measure) for run in runs]
        if any(scores):
            rows = [(classes[name], [of_run.get(name) for of_run in scores]) for name in order]
            tables.append({"measure": measure, "rows": rows})
    return tables


def _by_class(run: RunFolder, measure: Measure) -> dict[str, float | None]:
    scores = (run.summary.get("per_class") or {}).get(measure.per_class) or []
    names = [entry["name"] for entry in classes_of(run.summary)]
    return {name: finite({"iou": score}, "iou") for name, score in zip(names, scores, strict=False)}
