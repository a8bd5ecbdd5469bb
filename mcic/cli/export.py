"""`mcic export RUN --out DIR`: a trained network for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mcic.cli.parse import parse


@dataclass(kw_only=True, slots=True)
class ExportArgs:
    """Write a trained network as safetensors, torch.export program and ONNX model, with a model card.

    Each file is read back and compared with the network on real images; nothing is written where one differs.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run folder"""
    out: Path
    """folder for the files"""
    formats: tuple[Literal["safetensors", "torch", "onnx"], ...] | None = None
    """which; safetensors always; None: all for which the packages are there"""
    images: tuple[Path, ...] = ()
    """images to compare on; none: some of the run's val split"""
    overwrite: bool = False
    """replace an earlier export"""


def main(argv: list[str]) -> None:
    """Export and print what was compared."""
    args = parse(ExportArgs, argv, command="export")
    from mcic.export import export_network
    from mcic.log import print_table, setup_logging

    setup_logging()
    checks = export_network(args.run, args.out, formats=args.formats, images=args.images, overwrite=args.overwrite)
    rows = [
        (check.file, f"{check.max_difference:.1e}",
         f"of logits up to {check.largest_logit:.1f}, {check.equal_labels:.3f} % of the labels equal, "
         f"{check.mebibytes:.1f} MiB")
        for check in checks
    ]  # fmt: skip
    print_table(f"Largest difference from the network, on {checks[0].images} images", rows)
    print(f"{args.out}: README.md is the model card")
