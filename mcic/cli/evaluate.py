"""`mcic evaluate RUN`: print the scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mcic.cli.parse import parse, run_folder, score_rows


@dataclass(kw_only=True, slots=True)
class EvaluateArgs:
    """Score the network of a run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's folder"""
    protocol: Literal["single", "voc", "authors"] | None = None
    """single: one scale | voc: 0.75/1/1.25 and flip | authors: those, mean of mean and maximum; None: as the run"""
    split: Literal["val", "train"] = "val"
    """images to score"""
    device: str | None = None
    """auto | cpu | cuda | cuda:N; None: the run's own"""


def main(argv: list[str]) -> None:
    """Score the newest checkpoint of a run."""
    args = parse(EvaluateArgs, argv, command="evaluate")
    run = run_folder(args.run)
    from mcic.evaluate import evaluate_run
    from mcic.log import print_table, setup_logging

    setup_logging()
    scores = evaluate_run(run, protocol=args.protocol, split=args.split, device=args.device)
    print_table(f"{run.name} · {args.split}", score_rows(scores))
