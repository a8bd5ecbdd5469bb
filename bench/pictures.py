"""Where a network wins and where it fails: `python -m bench.pictures RUN OTHER --out PNG`.

Of the validation images of two runs on one data set: those on which RUN's network is furthest above OTHER's, those on
which it is furthest below, and those on which it is worst, by the mean IoU over the classes that an image shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mcic.cli import run
from mcic.config_io import load_config
from mcic.data import Dataset, build_data
from mcic.durable import write_with
from mcic.metrics import ConfusionMatrix
from mcic.predict import Predictor, load
from mcic.preview import contact_sheet, overlay

KINDS = ("win", "loss", "worst")


@dataclass(frozen=True, slots=True)
class Compared:
    """An image of val with both networks' masks.

    Attributes:
        id: in the data set.
        pixels: uint8 [H, W, 3].
        truth: uint8 [H, W].
        masks: of RUN and of OTHER, uint8 [H, W].
        scores: their mean IoUs, percent.
    """

    id: str
    pixels: np.ndarray
    truth: np.ndarray
    masks: tuple[np.ndarray, np.ndarray]
    scores: tuple[float, float]


def compare(first: Path, second: Path) -> tuple[list[Compared], np.ndarray]:
    """Every image of val that has ground truth, predicted by both runs, and the palette.

    Raises:
        ValueError: a run has no network, or the runs have not the same validation images and classes.
    """
    data, other = (build_data(load_config(folder / "config.yaml").data).val for folder in (first, second))
    if (data.ids, data.classes) != (other.ids, other.classes):
        raise ValueError(f"{first} and {second} must have the same validation images and classes")
    networks = [load(folder) for folder in (first, second)]
    return [found for index in range(len(data)) if (found := _compared(data, index, networks))], data.palette


def _compared(data: Dataset, index: int, networks: Sequence[Predictor]) -> Compared | None:
    pixels, truth = data.image(index), data.mask(index)
    if truth is None:
        return None
    masks = tuple(network.predict(pixels).mask for network in networks)
    scores = tuple(_score(mask, truth, num_classes=len(data.classes) + 1) for mask in masks)
    return Compared(data.ids[index], pixels, truth, masks, scores)


def _score(mask: np.ndarray, truth: np.ndarray, *, num_classes: int) -> float:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.from_numpy(mask), torch.from_numpy(truth))
    return matrix.miou() or 0.0


def chosen(images: Sequence[Compared], *, count: int) -> dict[str, list[Compared]]:
    """Up to `count` images of each of `KINDS`, the clearest first; none stands twice."""
    orders = {
        "win": lambda image: image.scores[1] - image.scores[0],
        "loss": lambda image: image.scores[0] - image.scores[1],
        "worst": lambda image: image.scores[0],
    }
    taken: set[str] = set()
    found = {}
    for kind, order in orders.items():
        fitting = [image for image in sorted(images, key=order) if image.id not in taken]
        found[kind] = [image for image in fitting if kind == "worst" or order(image) < 0][:count]
        taken |= {image.id for image in found[kind]}
    return found


def sheet(found: dict[str, list[Compared]], palette: np.ndarray, *, names: tuple[str, str]) -> np.ndarray:
    """The images of `chosen` below each other: image, truth and both masks; uint8 [height, width, 3]."""
    rows, captions = [], []
    for kind, images in found.items():
        for image in images:
            masks = (image.truth, *image.masks)
            rows.append([image.pixels, *(overlay(image.pixels, mask, palette) for mask in masks)])
            captions.append(f"{kind}: {image.scores[0]:.0f} against {image.scores[1]:.0f} ({image.id})")
    return contact_sheet(rows, ["image", "truth", *names], captions)


def main(argv: list[str]) -> int:
    """Write the sheet and print its captions."""
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="finished runs on one data set")
    parser.add_argument("--names", nargs=2, help="above their columns; default: the folders' names")
    parser.add_argument("--count", type=int, default=3, help="images of each kind; default: 3")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the sheet")
    options = parser.parse_args(argv)
    if options.count < 1:
        raise ValueError(f"--count must be 1 or more, got {options.count}")
    images, palette = compare(*options.runs)
    found = chosen(images, count=options.count)
    names = tuple(options.names or (folder.name for folder in options.runs))
    pixels = sheet(found, palette, names=names)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_with(options.out, lambda path: Image.fromarray(pixels).save(path, format="PNG"))
    for kind, shown in found.items():
        for image in shown:
            print(f"{kind}: {image.id}: {image.scores[0]:.1f} against {image.scores[1]:.1f}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run("python -m bench.pictures", main, sys.argv[1:]))
