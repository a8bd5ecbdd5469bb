"""The commands of `mcic`. Each imports what it runs when it runs: help and errors of a command line need no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mcic.cli.args import parse_train
from mcic.log import print_table, setup_logging
from mcic.suggest import nearest


@dataclass(kw_only=True, slots=True)
class EvaluateArgs:
    """Score the network of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run's folder"""
    protocol: Literal["single", "voc", "authors"] | None = None
    """single: one scale | voc: 0.75/1/1.25 and flip | authors: those, mean of mean and maximum; None: as the run"""
    split: Literal["val", "train"] = "val"
    """images to score"""


@dataclass(kw_only=True, slots=True)
class ReportArgs:
    """Write report.html of a run from what is in its folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run's folder"""


def train(argv: list[str]) -> None:
    """`mcic train`: what `python train.py` does."""
    config = parse_train(argv, program="mcic train")
    from mcic.trainer import Trainer

    setup_logging()
    Trainer(config).fit()


def evaluate(argv: list[str]) -> None:
    """`mcic evaluate RUN`: print the scores."""
    args = tyro.cli(EvaluateArgs, prog="mcic evaluate", args=argv)
    run = _run_folder(args.run)
    from mcic.evaluate import evaluate_run

    setup_logging()
    scores = evaluate_run(run, protocol=args.protocol, split=args.split)
    print_table(f"{run.name} · {args.split}", _rows(scores))


def report(argv: list[str]) -> None:
    """`mcic report RUN`: print the path of the page."""
    args = tyro.cli(ReportArgs, prog="mcic report", args=argv)
    run = _run_folder(args.run)
    from mcic.report import write_report

    print(write_report(run))


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": train, "evaluate": evaluate, "report": report}


def _run_folder(path: Path) -> Path:
    """`path` if it is a run folder; else a ValueError that names the nearest one beside it."""
    if (path / "config.yaml").is_file():
        return path
    beside = [folder.parent.name for folder in path.parent.glob("*/config.yaml")]
    raise ValueError(f"{path} is no run folder: expected a config.yaml in it{nearest(path.name, beside)}")


def _rows(scores: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The scores, which have a slash in their name, then the IoU of every class; percent."""
    rows = [(key, _percent(value), "") for key, value in scores.items() if "/" in key]
    for part, values in scores.get("per_class", {}).items():
        rows += [(name, _percent(value), part) for name, value in zip(scores["classes"], values, strict=True)]
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
