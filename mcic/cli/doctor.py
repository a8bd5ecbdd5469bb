"""`mcic doctor DIR`: one page on a folder of photographs before a run; the exit status says how it stands."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mcic.cli.args import parse_train
from mcic.cli.flags import groups
from mcic.cli.parse import json_file, parse
from mcic.durable import write_text

if TYPE_CHECKING:
    from mcic.doctor import Report

_SHOWN_NAMES, _SHOWN_CLASSES = 4, 30
_MARKS = {"drop": "left out", "look": "look at", "note": "note"}
_ENDS = (
    "Clean: nothing to do.",
    "Training would run; some things are left out or deserve a look.",
    "Training would fail.",
)


@dataclass(kw_only=True, slots=True)
class DoctorArgs:
    """Say what is in a folder of photographs and tags, what a run would leave out, and what it would cost.

    Flags of training may follow DIR, e.g. --train.batch-size 4: the folder is then examined for such a run.
    Exit status: 0 clean; 1 something is left out or deserves a look; 2 training would fail.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """the folder, as for --data.root"""
    json: str | None = None
    """write the findings, with all names, to this .json file; - prints them instead of the page"""
    estimate: bool = True
    """measure a few training steps"""


def main(argv: list[str]) -> int:
    """Print the page; returns the exit status."""
    own, training = _sorted(argv)
    args = parse(DoctorArgs, own, command="doctor")
    file = json_file(args.json, holds=("status", "findings"))
    config = parse_train(["folder", "--data.root", str(args.folder), *training], program="mcic doctor DIR")
    from mcic.doctor import examine

    logging.getLogger("mcic").handlers = [logging.NullHandler()]  # the page says it all
    report = examine(config, estimate=args.estimate)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    if args.json == "-":
        print(text)
        return report.status
    if file is not None:
        write_text(file, text + "\n")
    _print_page(report)
    return report.status


def _sorted(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words for this command, and the flags of training with theirs."""
    of_training = tuple(f"--{group}." for group in groups())
    own: list[str] = []
    training: list[str] = []
    chosen = own
    for word in argv:
        if word.startswith("--"):
            chosen = training if word.startswith(of_training) else own
        chosen.append(word)
    return own, training


def _print_page(report: Report) -> None:
    from mcic.log import print_table

    if report.classes:
        split = "held out" if report.held_out else "in val"
        print(f"{report.root}: {report.train} training images, {report.val} {split}, {len(report.classes)} classes, "
              f"{report.tags_per_image:.1f} tags an image")  # fmt: skip
        print_table("Images per class", _class_rows(report))
    if report.findings:
        _print_findings(report)
    if report.settings is not None:
        print_table("A run would take", _cost_rows(report))
    if report.error is not None:
        print(f"error: {report.error}")
    print(_ENDS[report.status])


def _class_rows(report: Report) -> list[tuple[str, str, str]]:
    """Images of every class; of very many classes the rarest."""
    classes = report.classes
    if len(classes) > _SHOWN_CLASSES:
        classes = sorted(classes, key=lambda entry: entry.train)[: _SHOWN_CLASSES - 1]
    rows = [(entry.name, str(entry.train), f"train, {entry.val} val") for entry in classes]
    hidden = len(report.classes) - len(classes)
    return [*rows, (f"{hidden} classes with more", "…", "--json lists them")] if hidden else rows


def _print_findings(report: Report) -> None:
    """One row per finding, with its first names."""
    table = Table(title="Findings", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for finding in report.findings:
        hidden = len(finding.names) - _SHOWN_NAMES
        names = [*finding.names[:_SHOWN_NAMES], *([f"… {hidden} more (--json lists them)"] if hidden > 0 else [])]
        said = Text(finding.text).append("\n" + "\n".join(names), style="dim")
        table.add_row(_MARKS[finding.level], str(len(finding.names)), said)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _cost_rows(report: Report) -> list[tuple[str, str, str]]:
    rows = [(name, str(value), "") for name, value in report.settings.items()]
    cost = report.estimate
    if cost is None:
        return rows
    where = f"an estimate from a few steps on this machine ({cost.device}): other work and hot processors are not in it"
    spread = f"{cost.fastest_step:.2f} to {cost.slowest_step:.2f}"
    reading = f"{1000 * cost.read_seconds:.0f} ms to read an image"
    each = f"{cost.steps} steps of {cost.seconds_per_step:.2f} s ({spread} measured), {reading}"
    workers = f"peak; loader processes ({cost.workers}) come on top" if cost.workers else "peak"
    return [
        *rows,
        ("training", _duration(cost.training_seconds), each),
        ("evaluation", _duration(cost.evaluation_seconds), "at the end and, where asked for, between"),
        ("memory", f"{cost.memory_gib:.1f} GiB", workers),
        ("together", _duration(cost.training_seconds + cost.evaluation_seconds), where),
    ]


def _duration(seconds: float) -> str:
    """Rounded up, as what is left of an hour."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
