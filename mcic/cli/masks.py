"""`mcic masks RUN`: write the masks of a run's images and print what they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mcic.cli.parse import parse, percent, run_folder


@dataclass(kw_only=True, slots=True)
class MasksArgs:
    """Write masks of the images that a run was trained on, from their tags: labels/, confidence/ and masks.json.

    Continues where it was interrupted. Several processes share the work: torchrun --nproc-per-node N --no-python mcic
    masks RUN.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's folder"""
    out: Path | None = None
    """folder for the masks; None: masks in the run's folder"""
    split: Literal["train", "val"] = "train"
    """whose masks"""
    source: Literal["merged", "context", "network", "cam"] | None = None
    """network: s | context: with the memory | cam: heatmaps | merged: mean of context and cam; None: merged where the
    run has a memory, else network"""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """sizes at which the network looks at an image, 0.1…10 times that at which the run read it"""
    flip: bool = True
    """also at its mirror image"""
    refine: Literal["crf", "pamr", "none"] = "crf"
    """crf: fully connected CRF | pamr: pixel-adaptive refinement"""
    unsure: float | None = None
    """ignore pixels whose winning class is less probable, 0…1; None: 0.9 after crf, else 0.6"""
    coco: bool = False
    """also write coco.json: the regions as run lengths"""
    overlays: bool = False
    """also overlays/: each image with its mask, to look at"""
    overwrite: bool = False
    """make masks anew that are there"""
    checkpoint: str = "newest"
    """newest | best: on val, of those that were evaluated (--eval.every) | step-…: a name in RUN/checkpoints"""
    device: str | None = None
    """auto | cpu | cuda | cuda:N; None: the run's own"""


def main(argv: list[str]) -> None:
    """Write the masks."""
    args = parse(MasksArgs, argv, command="masks")
    run = run_folder(args.run)
    from mcic.log import print_table, setup_logging
    from mcic.masks import MaskSettings, write_masks

    setup_logging()
    settings = MaskSettings(
        split=args.split, source=args.source, scales=args.scales, flip=args.flip, refine=args.refine,
        unsure=args.unsure,
    )  # fmt: skip
    manifest = write_masks(
        run, settings, checkpoint=args.checkpoint, out=args.out, coco=args.coco, overlays=args.overlays,
        overwrite=args.overwrite, device=args.device,
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        print_table(f"{run.name} · masks of {settings.split}", _rows(manifest, args.out or run / "masks"))


def _rows(manifest: dict[str, Any], folder: Path) -> list[tuple[str, str, str]]:
    settings, measured = manifest["settings"], manifest["measured"]
    truth = "against ground truth, ignored pixels as background; for information"
    return [
        ("masks", str(manifest["count"]), str(folder)),
        (
            "source",
            settings["source"],
            f"scales {', '.join(map(str, settings['scales']))}{' and mirrored' * settings['flip']}",
        ),
        ("refinement", settings["refine"], f"unsure below {settings['unsure']}"),
        ("labelled", percent(measured["labelled"]), "percent of the pixels; the others are ignored"),
        ("mIoU", percent(measured["mask_miou"]), truth if measured["mask_miou"] is not None else "no ground truth"),
    ]
