"""Where the masks that supervise a training come from, when it is not the tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mcic.data.base import Dataset
from mcic.data.images import read_mask

MANIFEST = "masks.json"
"""the file that `mcic masks` writes last"""


class Targets(Protocol):
    """Gives the mask that an image is to be trained with."""

    def __call__(self, dataset: Dataset, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """uint8 [H, W] labels (255: ignore) and f32 [H, W] confidence in 0…1, None where there are none."""


class GroundTruth:
    """The data set's own masks; every pixel counts the same."""

    def __call__(self, dataset: Dataset, index: int) -> tuple[np.ndarray | None, None]:
        return dataset.mask(index), None


class SavedMasks:
    """The labels and confidences that `mcic masks` wrote.

    Args:
        folder: with `masks.json`, `labels/` and `confidence/`.
        classes: of the data set; those of the masks must be the same.

    Raises:
        ValueError: the folder is not complete, or its masks are of other classes.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no finished masks: expected {MANIFEST} in it; mcic masks RUN makes them")
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = [name for name in self.manifest["classes"] if name != "background"]
        if known != list(classes):
            raise ValueError(f"the masks in {folder} are of the classes {', '.join(known)}, "
                             f"the data of {', '.join(classes)}")  # fmt: skip

    def __call__(self, dataset: Dataset, index: int) -> tuple[np.ndarray, np.ndarray]:
        labels, confidence = (self.folder / part / f"{dataset.ids[index]}.png" for part in ("labels", "confidence"))
        for path in (labels, confidence):
            if not path.is_file():
                raise ValueError(f"{path} is missing: run `mcic masks` again, it makes what is not there")
        with Image.open(confidence) as grey:
            return read_mask(labels), np.asarray(grey, dtype=np.float32) / 255
