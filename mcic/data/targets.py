"""Where the masks that supervise a training come from, when it is not the tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mcic.data.base import Dataset
from mcic.data.images import read_mask
from mcic.untrusted import read_json, shown

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
        dataset: the training images that they are for.

    Raises:
        ValueError: the folder is not complete, or its masks are of other classes or images.
    """

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder = folder
        self.manifest = _manifest(folder)
        split, known = self.manifest.get("settings", {}).get("split", "train"), self.manifest["classes"][1:]
        if split != "train":
            raise ValueError(f"the masks in {folder} are of the images of {shown(str(split))}, not of those of train")
        if known != list(dataset.classes):
            raise ValueError(f"the masks in {folder} are of the classes {shown(', '.join(known))}, "
                             f"the data of {shown(', '.join(dataset.classes))}")  # fmt: skip
        missing = [path for name in dataset.ids for path in self._files(name) if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing, with {len(missing) - 1} more: run mcic masks again, it makes "
                             "what is not there")  # fmt: skip

    def __call__(self, dataset: Dataset, index: int) -> tuple[np.ndarray, np.ndarray]:
        labels, confidence = (read_mask(path) for path in self._files(dataset.ids[index]))
        return labels, confidence.astype(np.float32) / 255

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.folder / "labels" / f"{name}.png", self.folder / "confidence" / f"{name}.png"


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished masks: expected {MANIFEST} in it; mcic masks RUN makes them")
    try:
        manifest = read_json(path)
        classes, settings = manifest["classes"], manifest.get("settings", {})
        if classes[0] == "background" and isinstance(settings, dict) and {*map(type, classes)} == {str}:
            return manifest
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is not what mcic masks wrote: make the masks again")
