"""`mcic predict MODEL IMAGES --out DIR`: masks, pictures and class areas of new images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mcic.cli.parse import parse


@dataclass(kw_only=True, slots=True)
class PredictArgs:
    """Segment images with a trained network.

    Writes labels/ (index PNGs), overlays/ and areas.csv. A call that was interrupted goes on where it stopped;
    photographs that were replaced, and those that lack a file that is asked for now, are predicted again. Several
    processes share the work: torchrun --nproc-per-node N --no-python mcic predict MODEL IMAGES --out DIR. Exit status:
    0; 1 if an image was passed over because it cannot be read; 2 if there is nothing to show.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """a run folder, or one that mcic export wrote"""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """files, folders (with their sub-folders), patterns such as 'photos/**/*.jpg', tars such as 'shards/*.tar'"""
    out: Path
    """folder for the results"""
    tags: str | None = None
    """classes that may occur: dog,sofa for all images, or a table (.csv, .tsv, .json, .jsonl) with a row for each"""
    protocol: Literal["single", "voc", "authors"] = "single"
    """single: one scale | voc: 0.75/1/1.25 and flip | authors: those, mean of mean and maximum"""
    long_side: int | None = None
    """pixels that the longer side of an image is brought to for the network; 0: as it is; None: as in training"""
    tile: int = 1536
    """what the network sees of an image at once, in pixels; larger ones are predicted in overlapping tiles"""
    overlays: bool = True
    """write pictures of image and mask"""
    confidence: bool = False
    """write the probability of every pixel's class as an 8-bit grey PNG"""
    overwrite: bool = False
    """predict images again that have a mask in the folder"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """arithmetic of the network"""


def main(argv: list[str]) -> int:
    """Predict; returns the exit status."""
    args = parse(PredictArgs, argv, command="predict")
    if not args.images:
        raise ValueError("mcic predict MODEL IMAGES --out DIR: no image was given")
    from mcic import distributed
    from mcic.data.tags import is_table
    from mcic.log import print_table, setup_logging
    from mcic.predict import load
    from mcic.predictions import find_images, predict_files, tags_of_images

    setup_logging()
    images = find_images(args.images, out=args.out)
    tags = args.tags
    if tags is not None:
        table = Path(tags)
        tags = tags_of_images(table, images) if is_table(table) else [name.strip() for name in tags.split(",")]
    predictor = load(
        args.model, device=args.device, precision=args.precision, protocol=args.protocol, tile=args.tile,
        long_side=args.long_side,
    )  # fmt: skip
    distributed.initialize(predictor.device)
    outcome = predict_files(
        predictor, images, args.out, tags=tags, overlays=args.overlays, confidence=args.confidence,
        overwrite=args.overwrite,
    )  # fmt: skip
    leads = distributed.rank() == 0
    distributed.finish()
    if not leads:
        return 0  # the first rank says how it went: torchrun ends the others as soon as one fails
    rows = [("predicted", str(outcome.predicted), "images")]
    if outcome.kept:
        rows.append(("there already", str(outcome.kept), "--overwrite predicts them again"))
    if outcome.failed:
        rows.append(("passed over", str(len(outcome.failed)), "could not be read"))
    print_table(str(args.out), rows)
    if outcome.failed:
        return 1 if outcome.predicted or outcome.kept else 2
    return 0
