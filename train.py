"""Train from image tags: parse → build → fit. `python train.py --help` says what can be set.

One process per GPU: `torchrun --nproc-per-node N train.py …`.
"""

import sys

from mcic.cli import run
from mcic.cli.args import parse_train


def train(argv: list[str]) -> None:
    """Train as the command line says; the run folder holds what comes of it."""
    config = parse_train(argv)
    from mcic.log import setup_logging  # after parsing: --help and a misspelt flag need not wait for torch
    from mcic.trainer import Trainer

    setup_logging()
    Trainer(config).fit()


if __name__ == "__main__":
    sys.exit(run("train.py", train, sys.argv[1:]))
