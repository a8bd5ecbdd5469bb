"""Label maps as COCO instances JSON: each class of an image is one region."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mcic.data.base import IGNORE, Dataset
from mcic.data.images import read_mask


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a bool [H, W] mask: column by column, beginning with a run of zeros."""
    bits = mask.ravel(order="F")
    changes = np.flatnonzero(bits[1:] != bits[:-1]) + 1
    start = [0] if bits.size and bits[0] else []
    counts = np.diff([0, *start, *changes, bits.size])
    return {"size": list(mask.shape), "counts": counts.tolist()}


def coco_instances(dataset: Dataset, labels: Path, *, root: Path | None) -> dict[str, Any]:
    """COCO instances of the label maps `labels/<id>.png`; image and annotation ids count from 1, category ids are mask
    values. Background and ignored pixels are in no region.

    `file_name` is the image's path below `root`, the folder of the data, or its id where it is no file in there.
    """
    images, annotations = [], []
    for index, image_id in enumerate(dataset.ids):
        label = read_mask(labels / f"{image_id}.png")
        height, width = label.shape
        name = _below(root, dataset.path(index)) or image_id
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        for value in np.unique(label[(label != 0) & (label != IGNORE)]).tolist():
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **_region(label == value, value)})
    categories = [{"id": value, "name": name} for value, name in enumerate(dataset.classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _below(root: Path | None, path: Path | None) -> str | None:
    """The path relative to `root`, with slashes; None where there is none."""
    if root is None or path is None:
        return None
    for folder in (root.expanduser(), root.expanduser().resolve()):  # a data set may have resolved it
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return None


def _region(mask: np.ndarray, category: int) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    area = int(mask.sum())
    return {"category_id": category, "segmentation": encode_rle(mask), "area": area, "bbox": box, "iscrowd": 0}
