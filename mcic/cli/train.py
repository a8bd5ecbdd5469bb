"""`mcic train`: what `python train.py` does."""

from __future__ import annotations

from mcic.cli.args import parse_train


def main(argv: list[str]) -> None:
    """Train as the command line says; the run folder holds what comes of it."""
    config = parse_train(argv, program="mcic train")
    from mcic.log import setup_logging
    from mcic.trainer import Trainer

    setup_logging()
    Trainer(config).fit()
