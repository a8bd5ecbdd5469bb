"""`report.html`: what a run did, for a person to look at, in one file that loads nothing from outside.

`write_report(run)` reads the run folder, builds a plain dict, and `templates/report.html` renders it. Only
`config.yaml` and one of `metrics.jsonl` and `summary.json` must be there; whatever else is absent, the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mcic.charts import Line, line_chart, number
from mcic.measures import (
    CAM,
    CONTEXT,
    CONTROL,
    EVALUATION_FIGURES,
    MASKS,
    NETWORK,
    SCORES,
    TRAINING_FIGURES,
    Figure,
    Measure,
)
from mcic.report_gallery import build_gallery
from mcic.report_page import classes_of, confusion_svg, duration, render, require_page, write_page
from mcic.runfolder import RunFolder, column, finite, read_run, steps


def write_report(run: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: folder with `config.yaml` and `metrics.jsonl` or `summary.json`, better with both, and where there are
            any `env.json`, `evaluations.jsonl`, `previews/final/index.json` and `previews/final/readings.json`.
        out: the page; None: `report.html` in the run's folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder is no run folder, one of its files cannot be read, or `out` is a file of another kind.
    """
    folder = read_run(Path(run))
    path = folder.path / "report.html" if out is None else require_page(Path(out))
    return write_page(path, render("report.html", _context(folder)))


def _context(run: RunFolder) -> dict[str, Any]:
    """Everything the template shows."""
    summary = run.summary
    classes = classes_of(summary)
    return {
        "name": run.path.resolve().name,
        "preset": run.config.get("preset") or "Training run",
        "facts": _facts(run),
        "verdict": _verdict(summary),
        "notes": _notes(run),
        "tiles": [_score(measure, summary) for measure in (NETWORK, *MASKS)],
        "results": [_score(measure, summary) for measure in SCORES],
        "figures": [*_figures(TRAINING_FIGURES, run.metrics), *_figures(EVALUATION_FIGURES, run.evaluations)],
        "classes": classes,
        "per_class": _per_class(summary, classes),
        "confusion": confusion_svg(summary),
        "gallery": build_gallery([run]) if run.examples else None,
        "scalars": {key: value for key, value in summary.items() if not isinstance(value, list | dict)},
        "config": {name: group for name, group in run.config.items() if isinstance(group, dict)},
        "env": run.env,
    }


def _facts(run: RunFolder) -> dict[str, Any]:
    """The few settings and figures that stand under the title; those that are not known are left out."""
    seconds, speed = finite(run.summary, "seconds"), finite(run.summary, "images_per_second")
    facts = {
        "data": run.setting("data", "root") or run.setting("data", "name"),
        "backbone": run.setting("model", "backbone"),
        "rules": run.setting("method", "rules"),
        "context": run.setting("method", "context"),
        "supervision": run.setting("method", "supervision"),
        "epochs": run.setting("train", "epochs"),
        "steps": run.metrics[-1].get("step") if run.metrics else None,
        "batch": run.setting("train", "batch_size"),
        "crop": run.setting("train", "size"),
        "seed": run.setting("train", "seed"),
        "backend": run.summary.get("backend"),
        "time": duration(seconds) if seconds is not None else None,
        "speed": f"{number(speed)} images/s" if speed is not None else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _verdict(summary: dict[str, Any]) -> str:
    cam, control, context = (finite(summary, mask.key) for mask in (CAM, CONTROL, CONTEXT))
    if context is None and control is not None:
        return "This run trains no context mask, so that there is no memory to be judged."
    if context is None or cam is None:
        return "The masks were not all measured, so nothing can be said of what the memory adds."
    gain = _compare(context - cam, "the CAM mask")
    if control is None:
        return f"On the training images the context mask is {gain}; the control was not measured."
    return f"On the training images the context mask is {gain} and {_compare(context - control, 'the control')}."


def _compare(difference: float, other: str) -> str:
    if abs(difference) < 0.05:
        return f"level with {other}"
    return f"{abs(difference):.1f} points {'better' if difference > 0 else 'worse'} than {other}"


def _notes(run: RunFolder) -> list[str]:
    """What is absent or went wrong, a sentence each."""
    notes = []
    absent = [measure.name for measure in (NETWORK, *MASKS) if finite(run.summary, measure.key) is None]
    if not run.summary:
        notes.append("There is no summary.json: the run is unfinished, and its final scores are not known.")
    elif absent:
        notes.append(f"Not measured: {', '.join(absent)}.")
    if not run.metrics:
        notes.append("There are no curves: metrics.jsonl is absent or empty.")
    wrong = [row for row in run.metrics if "loss/total" in row and finite(row, "loss/total") is None]
    if wrong:
        first = wrong[0].get("step", "?")
        notes.append(f"Training diverged: the loss is not finite in {len(wrong)} logged steps, first in step {first}.")
    if run.setting("method", "supervision") == "full":
        notes.append("Trained on ground-truth masks (--method.supervision full): the ceiling, not the method.")
    elif run.summary.get("ground_truth_used"):
        notes.append("Ground-truth masks were used on the way to this run: for a threshold or an earlier stage.")
    if not run.examples:
        notes.append("There are no examples: previews/final/index.json is absent or empty.")
    if not run.env:
        notes.append("Versions and machine are not known: env.json is absent or empty.")
    return notes


def _score(measure: Measure, summary: dict[str, Any]) -> dict[str, Any]:
    """A measure with its value, its coverage, and for masks what it gains over the CAM mask and over the control."""
    value = finite(summary, measure.key)

    def over(other: Measure) -> float | None:
        base = finite(summary, other.key)
        comparable = measure in MASKS and measure is not other and value is not None and base is not None
        return value - base if comparable else None

    return {
        "measure": measure,
        "where": measure.measured_on(summary),
        "value": value,
        "coverage": finite(summary, measure.coverage) if measure.coverage else None,
        "over_cam": over(CAM),
        "over_control": over(CONTROL),
    }


def _figures(figures: Sequence[Figure], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts for which `rows` hold any value; the legend carries the last one of every curve."""
    charts = []
    for figure in figures:
        lines = [Line(curve.name, curve.color, column(rows, curve.key), curve.dashed) for curve in figure.curves]
        lines = [line for line in lines if np.isfinite(line.values).any()]
        if lines:
            legend = [(line, line.values[np.isfinite(line.values)][-1]) for line in lines]
            svg = line_chart(steps(rows), lines, label=figure.title, top=figure.top)
            charts.append({"title": figure.title, "note": figure.note, "svg": Markup(svg), "legend": legend})
    return charts


def _per_class(summary: dict[str, Any], classes: list[dict[str, str]]) -> dict[str, Any]:
    """`columns`: the measures that have per-class scores; `rows`: class and scores (None where there is none)."""
    scores = summary.get("per_class") or {}
    columns = [measure for measure in (NETWORK, *MASKS) if scores.get(measure.per_class)]
    rows = [
        (entry, [finite(dict(enumerate(scores[measure.per_class])), k) for measure in columns])
        for k, entry in enumerate(classes)
    ]
    return {"columns": columns, "rows": rows if columns else []}
