"""`mcic report RUN`: print the path of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mcic.cli.parse import parse, run_folder


@dataclass(kw_only=True, slots=True)
class ReportArgs:
    """Write report.html of a run from what is in its folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run's folder"""


def main(argv: list[str]) -> None:
    """Write the page."""
    args = parse(ReportArgs, argv, command="report")
    run = run_folder(args.run)
    from mcic.report import write_report

    print(write_report(run))
