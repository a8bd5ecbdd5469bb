"""COCO 2014 from its instances JSON: tags, and masks drawn from the instances on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mcic.data.base import IGNORE, Dataset
from mcic.data.images import read_image
from mcic.data.names import check_classes, tag_matrix
from mcic.data.palette import voc_palette

LAYOUT = "a folder with annotations/instances_{train,val}2014.json and the images in train2014/ and val2014/"


class COCO14(Dataset):
    """The 80 object classes of COCO in the order of their category ids, which the JSON lists with gaps.

    Training images without any object are left out; val keeps them. An image's tags are the classes of all its
    annotations, crowds too. In a mask smaller instances lie on top of larger ones; crowds are ignore where no
    instance lies on them.
    """

    def __init__(self, root: str | Path, split: Literal["train", "val"]) -> None:
        """
        Args:
            root: the folder with `annotations/` and the image folders.
            split: train or val.

        Raises:
            ValueError: a part of the layout is missing, or the JSON does not hold COCO instances.
        """
        self.name = "coco14"
        self.root = Path(root).expanduser()
        self._images = self.root / f"{split}2014"
        annotations = self.root / "annotations" / f"instances_{split}2014.json"
        if not annotations.is_file() or not self._images.is_dir():
            missing = self._images.name + "/" if annotations.is_file() else annotations.relative_to(self.root)
            raise ValueError(f"--data.root has no {missing}: expected {LAYOUT}, got {self.root}")
        try:
            self._index(json.loads(annotations.read_bytes()), keep_empty=split == "val", source=annotations)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{annotations} does not hold COCO instances: {error!r}") from error
        self.palette = voc_palette(len(self.classes) + 1)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def mask(self, index: int) -> np.ndarray:
        shapes = json.loads(self._shapes[self._starts[index] : self._stops[index]].tobytes())
        return _drawn(shapes, *self._sizes[index].tolist())

    def path(self, index: int) -> Path:
        return self._images / self._files[index]

    def _index(self, content: dict[str, Any], *, keep_empty: bool, source: Path) -> None:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = check_classes([category["name"] for category in categories], source=source)
        places = {category["id"]: place for place, category in enumerate(categories)}
        objects: dict[int, list[list[Any]]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            shape = [places[entry["category_id"]], entry.get("iscrowd", 0), entry["area"], entry["segmentation"]]
            objects[entry["image_id"]].append(shape)
        images = [image for image in content["images"] if keep_empty or objects[image["id"]]]
        images.sort(key=lambda image: image["file_name"])
        self._files = [image["file_name"] for image in images]
        self.ids = [Path(name).stem for name in self._files]
        self._sizes = np.array([(image["height"], image["width"]) for image in images]).reshape(-1, 2)
        self.tags = tag_matrix([{shape[0] for shape in objects[image["id"]]} for image in images], len(self.classes))
        self._store([json.dumps(objects[image["id"]]).encode() for image in images])

    def _store(self, texts: list[bytes]) -> None:
        """One block of bytes for all instances: Python objects would be copied page by page into every worker."""
        self._stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._starts = self._stops - [len(text) for text in texts]
        self._shapes = np.frombuffer(b"".join(texts), np.uint8)

    def _keep(self, indices: np.ndarray) -> None:
        super()._keep(indices)
        self._files = [self._files[i] for i in indices]
        self._sizes, self._starts, self._stops = self._sizes[indices], self._starts[indices], self._stops[indices]


def _drawn(shapes: list[list[Any]], height: int, width: int) -> np.ndarray:
    """uint8 [height, width] of instances (class index, is crowd, area, polygons or RLE)."""
    try:
        from pycocotools import mask as rle
    except ImportError as error:
        raise ValueError("masks of COCO need pycocotools: pip install pycocotools") from error
    mask = np.zeros((height, width), np.uint8)
    for place, crowd, _, segmentation in sorted(shapes, key=lambda shape: (-shape[1], -shape[2])):
        if isinstance(segmentation, list):
            encoded = rle.merge(rle.frPyObjects(segmentation, height, width)) if segmentation else None
        elif isinstance(segmentation["counts"], list):
            encoded = rle.frPyObjects(segmentation, height, width)
        else:
            encoded = segmentation
        if encoded is not None:
            mask[rle.decode(encoded) > 0] = IGNORE if crowd else place + 1
    return mask
