"""`mcic calibrate RUN`: choose how much of an image the CAM mask gives to objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mcic.cli.parse import parse, run_folder


@dataclass(kw_only=True, slots=True)
class CalibrateArgs:
    """Choose how much of a run's images the CAM mask gives to objects; without --masks no ground truth is looked at.

    That is α of the background row (--method.background-power), or T_a (--method.cam-threshold) where the published row
    reads a saliency map (--method.cam-background authors).
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's folder; calibration.json is written there"""
    masks: Path | None = None
    """folder of index PNGs, named by image id, of a few annotated training images: they choose instead"""
    device: str | None = None
    """auto | cpu | cuda | cuda:N; None: as the run"""


def main(argv: list[str]) -> None:
    """Print the score of every value, and how to train with the best one."""
    args = parse(CalibrateArgs, argv, command="calibrate")
    run = run_folder(args.run)
    from mcic.calibrate import FILE, calibrate
    from mcic.log import print_table, setup_logging

    setup_logging()
    result = calibrate(run, masks=args.masks, device=args.device)
    flag = f"--method.{result.field.replace('_', '-')}"
    unit = "information of colours × contrast of borders" if args.masks is None else "mIoU of the annotated images"
    notes = {result.current: "this run's"} | {result.chosen: "best"}
    rows = [
        (f"{flag} {value:g}", f"{score:.4f}" if args.masks is None else f"{score:.1f}", notes.get(value, ""))
        for value, score in result.scores.items()
    ]
    print_table(f"{unit}, {result.num_images} images", rows)
    if result.chosen == result.current:
        print("The run has the best value already.")
    else:
        print(f"To train with it: --data.calibration {run / FILE}")
