"""PASCAL VOC 2012 in the VOCdevkit layout, with the SBD masks where they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mcic.data.base import Dataset
from mcic.data.fence import Fence
from mcic.data.images import read_image, read_mask
from mcic.data.names import is_text, tag_matrix
from mcic.data.palette import voc_palette
from mcic.data.tags import object_names
from mcic.suggest import nearest
from mcic.untrusted import read_text, shown

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LAYOUT = (
    "the VOCdevkit/VOC2012 folder with JPEGImages/, Annotations/, SegmentationClass/ and ImageSets/Segmentation/ "
    "(and SegmentationClassAug/ for the augmented training set)"
)


class VOC12(Dataset):
    """The segmentation part of VOC 2012.

    With `SegmentationClassAug/` the training set is every image that has a mask there and is not in val (10,582 of
    them in the published data), as is usual in the field; without it, `train.txt`. Masks of `val` always come from
    `SegmentationClass/`. An image's tags are the names of all objects in its XML, difficult ones too.
    """

    def __init__(self, root: str | Path, split: Literal["train", "val"], *, follow_links: bool = False) -> None:
        """
        Args:
            root: VOC2012, VOCdevkit or the folder that holds it.
            split: train or val.
            follow_links: whether links may lead out of `root`.

        Raises:
            ValueError: a part of the layout, an image or a mask is missing, empty or a link that may not be followed,
                or an annotation is missing, broken or of an unknown class. No image is opened.
        """
        self.name = "voc12"
        self.classes = CLASSES
        self.palette = voc_palette(len(CLASSES) + 1)
        self.root = _find(Path(root).expanduser())
        self._fence = Fence.around(root, follow_links=follow_links)
        augmented = self.root / "SegmentationClassAug"
        derived = split == "train" and augmented.is_dir()
        self._masks = augmented if derived else self.root / "SegmentationClass"
        self.ids = _augmented_ids(augmented, self._list("val")) if derived else self._list(split)
        images, annotations = (self._fence.require(self.root / name) for name in ("JPEGImages", "Annotations"))
        self._fence.require_files(images, [f"{image_id}.jpg" for image_id in self.ids], "images")
        self._fence.require_files(
            self._fence.require(self._masks), [f"{image_id}.png" for image_id in self.ids], "masks"
        )
        paths = [self._fence.require(annotations / f"{image_id}.xml") for image_id in self.ids]
        self.tags = tag_matrix([_object_classes(path) for path in paths], len(CLASSES))

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def mask(self, index: int) -> np.ndarray:
        return read_mask(self._masks / f"{self.ids[index]}.png")

    def path(self, index: int) -> Path:
        return self.root / "JPEGImages" / f"{self.ids[index]}.jpg"

    def _list(self, split: str) -> list[str]:
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            raise ValueError(f"--data.root has no {path.relative_to(self.root)}: expected {LAYOUT}, in {self.root}")
        ids = read_text(self._fence.require(path)).split()
        for image_id in ids:
            if "/" in image_id or not is_text(image_id):
                raise ValueError(f"{path} lists {shown(image_id)!r}: expected ids, the names of images without .jpg")
        return list(dict.fromkeys(ids))


def _find(root: Path) -> Path:
    for candidate in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (candidate / "JPEGImages").is_dir():
            return candidate
    raise ValueError(f"--data.root has no JPEGImages/: expected {LAYOUT}, got {root}")


def _augmented_ids(masks: Path, val: list[str]) -> list[str]:
    return sorted({path.stem for path in masks.glob("*.png")} - set(val))


def _object_classes(path: Path) -> list[int]:
    """Class indices of the objects of an annotation; a part of an object, e.g. a head, is none."""
    try:
        names = object_names(path)
    except FileNotFoundError as error:
        raise ValueError(f"image {path.stem} has no annotation: expected {path}") from error
    for name in sorted(names - set(CLASSES)):
        raise ValueError(f"{path} has an object {shown(name)!r}, which is no class of VOC{nearest(name, CLASSES)}")
    return [CLASSES.index(name) for name in names]
