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
from mcic.data import build_data
from mcic.data.base import IGNORE
from mcic.durable import write_with
from mcic.metrics import ConfusionMatrix
from mcic.predict import load
from mcic.preview import contact_sheet, overlay


@dataclass(frozen=True, slots=True)
class Compared:
    """An image of val: its place and name in the data set, and the mean IoUs of RUN and OTHER, percent."""

    index: int
    id: str
    scores: tuple[float, float]


class Comparison:
    """Two runs on one data set.

    Raises:
        ValueError: one is no run or has no network, or they have not the same validation images and classes.
    """

    def __init__(self, first: Path, second: Path) -> None:
        self.networks = tuple(load(folder) for folder in (first, second))
        self.data, other = (build_data(load_config(folder / "config.yaml").data).val for folder in (first, second))
        if (self.data.ids, self.data.classes) != (other.ids, other.classes):
            raise ValueError(f"{first} and {second} must have the same validation images and classes")

    def images(self) -> list[Compared]:
        """Those that have ground truth anywhere; raises ValueError where there are none."""
        found = []
        for index, name in enumerate(self.data.ids):
            truth = self.data.mask(index)
            if truth is not None and (truth != IGNORE).any():
                found.append(Compared(index, name, tuple(self._score(mask, truth) for mask in self.masks(index))))
        if not found:
            raise ValueError(f"the validation images of {self.data.name} have no masks to measure by")
        return found

    def masks(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What both networks say of an image, uint8 [H, W] each."""
        pixels = self.data.image(index)
        return tuple(network.predict(pixels).mask for network in self.networks)

    def _score(self, mask: np.ndarray, truth: np.ndarray) -> float:
        matrix = ConfusionMatrix(len(self.data.classes) + 1)
        matrix.update(torch.from_numpy(mask), torch.from_numpy(truth))
        return matrix.miou()

    def sheet(self, found: dict[str, list[Compared]], *, names: tuple[str, str]) -> np.ndarray:
        """The images of `chosen` below each other: image, truth and both masks; uint8 [height, width, 3]."""
        rows, captions = [], []
        for kind, images in found.items():
            for image in images:
                pixels, masks = self.data.image(image.index), (self.data.mask(image.index), *self.masks(image.index))
                rows.append([pixels, *(overlay(pixels, mask, self.data.palette) for mask in masks)])
                captions.append(f"{kind}: {image.scores[0]:.0f} against {image.scores[1]:.0f} ({image.id})")
        return contact_sheet(rows, ["image", "truth", *names], captions)


def chosen(images: Sequence[Compared], *, count: int) -> dict[str, list[Compared]]:
    """Up to `count` images of each kind (win, loss, worst), the clearest first; none stands twice."""
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
    comparison = Comparison(*options.runs)
    found = chosen(comparison.images(), count=options.count)
    pixels = comparison.sheet(found, names=tuple(options.names or (folder.name for folder in options.runs)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_with(options.out, lambda path: Image.fromarray(pixels).save(path, format="PNG"))
    for kind, shown in found.items():
        for image in shown:
            print(f"{kind}: {image.id}: {image.scores[0]:.1f} against {image.scores[1]:.1f}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run("python -m bench.pictures", main, sys.argv[1:]))
