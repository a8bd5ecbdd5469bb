"""`mcic report RUN [RUN …]`: print the path of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mcic.cli.parse import parse, run_folder


@dataclass(kw_only=True, slots=True)
class ReportArgs:
    """Write the page of a run, or one that compares several runs, from what is in their folders."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """folder of the run; several are compared, the others with the first"""
    out: Path | None = None
    """the page; None: report.html in the run's folder, comparison.html here for several runs"""


def main(argv: list[str]) -> None:
    """Write the page."""
    args = parse(ReportArgs, argv, command="report")
    runs = [run_folder(path) for path in args.runs]
    if not runs:
        raise ValueError("mcic report needs a run's folder: mcic report RUN [RUN …]")
    from mcic.report import write_report
    from mcic.report_comparison import write_comparison

    if len(runs) > 1:
        print(write_comparison(runs, out=args.out or Path("comparison.html")))
    else:
        print(write_report(runs[0], out=args.out))
