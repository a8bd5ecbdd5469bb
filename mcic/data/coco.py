"""COCO 2014 from its instances JSON: tags, and masks drawn from the instances on demand."""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mcic.data.base import IGNORE, Dataset, Splits
from mcic.data.fence import Fence
from mcic.data.images import read_image
from mcic.data.names import check_classes, is_text, tag_matrix
from mcic.data.palette import voc_palette
from mcic.data.tags import image_name
from mcic.untrusted import read_json, shown

LAYOUT = "a folder with annotations/instances_{train,val}2014.json and the images in train2014/ and val2014/"


class COCO14(Dataset):
    """The 80 object classes of COCO in the order of their category ids, which the JSON lists with gaps.

    Training images without any object are left out; val keeps them. An image's tags are the classes of all its
    annotations, crowds too. In a mask smaller instances lie on top of larger ones; crowds are ignore where no
    instance lies on them.
    """

    def __init__(self, root: str | Path, split: Literal["train", "val"], *, follow_links: bool = False) -> None:
        """
        Args:
            root: the folder with `annotations/` and the image folders.
            split: train or val.
            follow_links: whether links may lead out of `root`.

        Raises:
            ValueError: a part of the layout is missing, the JSON does not hold COCO instances, or an image is missing,
                empty or a link that may not be followed, or pycocotools is not installed. No image is opened.
        """
        if find_spec("pycocotools") is None:
            raise ValueError("masks of COCO need pycocotools: pip install pycocotools")
        self.name = "coco14"
        self.root = Path(root).expanduser()
        self._images = self.root / f"{split}2014"
        annotations = _annotations(self.root, split)
        if not annotations.is_file() or not self._images.is_dir():
            missing = self._images.name + "/" if annotations.is_file() else annotations.relative_to(self.root)
            raise ValueError(f"--data.root has no {missing}: expected {LAYOUT}, got {self.root}")
        fence = Fence.around(root, follow_links=follow_links)
        content = read_json(fence.require(annotations))
        try:
            self._index(content, keep_empty=split == "val", source=annotations)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{annotations} does not hold COCO instances: {shown(repr(error))}") from error
        fence.require_files(fence.require(self._images), self._files, "images")
        self.palette = voc_palette(len(self.classes) + 1)

    @classmethod
    def splits(cls, root: str | Path, *, follow_links: bool = False) -> Splits:
        """Both splits; raises ValueError as each of them does, and where a class id would mean another class in val."""
        train, val = (cls(root, split, follow_links=follow_links) for split in ("train", "val"))
        for place, (name, other) in enumerate(zip_longest(train.classes, val.classes, fillvalue=""), 1):
            if name != other:
                raise ValueError(
                    f"{_annotations(train.root, 'train')} and {_annotations(val.root, 'val')} must list the same "
                    f"categories, got {shown(name)!r} and {shown(other)!r} as class {place}: give both one list"
                )
        return Splits(train, val)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def mask(self, index: int) -> np.ndarray:
        shapes = json.loads(self._shapes[self._starts[index] : self._stops[index]].tobytes())
        try:
            return _drawn(shapes, *self._sizes[index].tolist())
        except ValueError as error:
            raise ValueError(f"the annotations of image {self.path(index)} cannot be drawn: {error}") from error

    def path(self, index: int) -> Path:
        return self._images / self._files[index]

    def _index(self, content: dict[str, Any], *, keep_empty: bool, source: Path) -> None:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = check_classes([category["name"] for category in categories], source=source)
        places = {category["id"]: place for place, category in enumerate(categories)}
        objects: dict[int, list[list[Any]]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            area, crowd = entry["area"], entry.get("iscrowd", 0)
            if not isinstance(area, int | float) or not 0 <= area < math.inf or crowd not in (0, 1):
                got = f"area {shown(repr(area))} and iscrowd {shown(repr(crowd))}"
                raise ValueError(f"{source}: an annotation has {got}: expected a number and 0 or 1")
            objects[entry["image_id"]].append([places[entry["category_id"]], crowd, area, entry["segmentation"]])
        images = [image for image in content["images"] if keep_empty or objects[image["id"]]]
        for image in images:
            image_name(image["file_name"], f"{source}, image {shown(str(image['id']))}")
        images.sort(key=lambda image: image["file_name"])
        self._files = [image["file_name"] for image in images]
        self.ids = [Path(name).stem for name in self._files]
        if wrong := [name for name, count in Counter(self.ids).items() if count > 1 or not is_text(name)]:
            raise ValueError(f"{source} has several images of the name {shown(wrong[0])!r}, or it is no text")
        sizes = [(image["height"], image["width"]) for image in images]
        if wrong := [size for size in sizes if not all(type(side) is int and 0 < side < 2**16 for side in size)]:
            raise ValueError(f"{source} has an image of height and width {shown(str(wrong[0]))}: expected pixels")
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
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


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2014.json"


def _drawn(shapes: list[list[Any]], height: int, width: int) -> np.ndarray:
    """uint8 [height, width] of instances (class index, is crowd, area, polygons or RLE); raises ValueError."""
    mask = np.zeros((height, width), np.uint8)
    for place, crowd, _, segmentation in sorted(shapes, key=lambda shape: (-shape[1], -shape[2])):
        if isinstance(segmentation, list):
            inside = _filled(segmentation, height, width)
        else:
            runs = np.array(_runs(segmentation, height * width))
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
        mask[inside] = IGNORE if crowd else place + 1
    return mask


def _filled(polygons: list[Any], height: int, width: int) -> np.ndarray:
    """bool [height, width] of polygons [x, y, x, y, …]."""
    from pycocotools import mask as rle

    reach = 2 * max(height, width)  # pycocotools takes memory for every pixel of a line, however far it leads
    for polygon in polygons:
        sides = polygon if isinstance(polygon, list) else []
        if not sides or len(sides) % 2 or not all(type(x) in (int, float) and -reach <= x <= reach for x in sides):
            raise ValueError(f"a polygon is {shown(str(polygon))}: expected x, y, …")
    areas = [polygon for polygon in polygons if len(polygon) >= 6]  # a line of two corners encloses nothing
    if not areas:
        return np.zeros((height, width), bool)
    return rle.decode(rle.merge(rle.frPyObjects(areas, height, width))) > 0


def _runs(region: Any, num_pixels: int) -> list[int]:
    """The run lengths of an RLE, column by column, the first of what is outside: a list, or COCO's text.

    The text has 5 bits a character, the lowest first; from the fourth run on they are the difference to the last but
    one. Nobody else checks that the runs fit the image.
    """
    runs = region.get("counts") if isinstance(region, dict) else None
    if isinstance(runs, str):
        runs, value, shift = [], 0, 0
        for code in (ord(letter) - 48 for letter in region["counts"]):
            value |= (code & 31) << shift
            shift += 5
            if not 0 <= code < 64 or shift > 60:
                raise ValueError("an RLE is not in COCO's alphabet")
            if not code & 32:
                value -= (code & 16) << (shift - 4)
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != num_pixels:
        raise ValueError(f"an RLE does not cover the image's {num_pixels} pixels: {shown(str(region))}")
    return runs
