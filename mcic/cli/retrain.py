"""`mcic retrain RUN`: train a plain network on the masks of a run."""

from __future__ import annotations

from pathlib import Path

from mcic.cli.args import parse_flags
from mcic.cli.parse import run_folder
from mcic.retrain import retrain_config

_USAGE = """usage: mcic retrain RUN [--data.masks DIR] [--group.field VALUE …]

Train a plain segmentation network on the masks that mcic masks RUN wrote; the result is the run folder RUN/retrain.
Data, network and schedule are those of RUN, and every flag of mcic train changes them (mcic train --help, or mcic
retrain RUN --help, which shows the values of RUN)."""


def main(argv: list[str]) -> None:
    """Train as the first stage's configuration and the flags say."""
    if not argv:
        raise ValueError("mcic retrain takes the folder of a run")
    if argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    config = parse_flags(argv[1:], retrain_config(run_folder(Path(argv[0]))), program="mcic retrain RUN")
    from mcic.log import setup_logging
    from mcic.trainer import Trainer

    setup_logging()
    Trainer(config).fit()
