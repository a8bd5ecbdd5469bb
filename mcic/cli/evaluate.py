"""`mcic evaluate RUN`: print the scores."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mcic.cli.parse import json_file, parse, run_folder, score_rows
from mcic.durable import write_text


@dataclass(kw_only=True, slots=True)
class EvaluateArgs:
    """Score the network of a run.

    Several processes share the images: torchrun --nproc-per-node N --no-python mcic evaluate RUN.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's folder"""
    protocol: Literal["single", "voc", "authors"] | None = None
    """single: one scale | voc: 0.75/1/1.25 and flip | authors: those, mean of mean and maximum; None: as the run"""
    split: Literal["val", "train"] = "val"
    """images to score"""
    checkpoint: str = "newest"
    """newest | best: on val, of those that were evaluated (--eval.every) | step-…: a name in RUN/checkpoints"""
    json: str | None = None
    """write the scores to this .json file; - prints them instead of the table"""
    device: str | None = None
    """auto | cpu | cuda | cuda:N; None: the run's own"""


def main(argv: list[str]) -> None:
    """Score a checkpoint of a run."""
    args = parse(EvaluateArgs, argv, command="evaluate")
    run, file = run_folder(args.run), json_file(args.json, holds=("checkpoint", "per_class"))
    from mcic.evaluate import evaluate_run
    from mcic.log import print_table, setup_logging

    setup_logging()
    if args.json == "-":
        logging.getLogger("mcic").handlers = [logging.StreamHandler()]  # standard output is for the scores alone
    scores = evaluate_run(
        run, checkpoint=args.checkpoint, protocol=args.protocol, split=args.split, device=args.device
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return
    text = json.dumps(scores, indent=1, ensure_ascii=False)
    if args.json == "-":
        print(text)
        return
    if file is not None:
        write_text(file, text + "\n")
    print_table(f"{run.name} · {scores['checkpoint']} · {scores['images']} images of {args.split}", score_rows(scores))
