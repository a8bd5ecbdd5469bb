"""Small data sets on disk, in the layouts that the data classes read.

Every image is a dim noisy ground with one or two bright rectangles; the colour of a rectangle says its class, so a
mask can be checked against its image.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mcic.data.palette import voc_palette

COLOURS = voc_palette(256)


def scene(index: int, labels: Sequence[int], *, size: tuple[int, int] = (40, 56)) -> tuple[np.ndarray, np.ndarray]:
    """uint8 image [H, W, 3] and mask [H, W] with a rectangle for each mask value of `labels`."""
    height, width = size
    random = np.random.default_rng(index)
    image = random.integers(0, 40, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    share = width // max(1, len(labels))
    for place, label in enumerate(labels):
        top, left = int(random.integers(2, height // 3)), place * share + 3
        box = slice(top, top + height // 2), slice(left, left + share - 6)
        image[box] = 55 + COLOURS[label] // 2 + random.integers(0, 20, image[box].shape).astype(np.uint8)
        mask[box] = label
    return image, mask


def save_mask(path: Path, mask: np.ndarray) -> None:
    """A palette PNG, as the field stores masks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(COLOURS.tobytes())
    image.save(path)


def save_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def make_voc(root: Path, *, train: int = 4, augmented: int = 4, val: int = 3) -> Path:
    """VOC 2012 below `root`, returned: `train` and `val` images with masks and `augmented` more with SBD masks only.

    Without `augmented` there is no SegmentationClassAug/. Image i shows class 1 + i % 3 of the twenty, and with i
    odd also "person".
    """
    from mcic.data.voc import CLASSES

    base = root / "VOCdevkit" / "VOC2012"
    lists: dict[str, list[str]] = {"train": [], "aug": [], "val": []}
    parts = ["train"] * train + ["aug"] * augmented + ["val"] * val
    for index, part in enumerate(parts):
        image_id = f"2007_{index:06d}"
        lists[part].append(image_id)
        labels = [1 + index % 3] + [CLASSES.index("person") + 1] * (index % 2)
        image, mask = scene(index, labels)
        mask[0] = 255
        save_image(base / "JPEGImages" / f"{image_id}.jpg", image)
        if part != "aug":
            save_mask(base / "SegmentationClass" / f"{image_id}.png", mask)
        if augmented:
            save_mask(base / "SegmentationClassAug" / f"{image_id}.png", mask)
        _write_voc_xml(base / "Annotations" / f"{image_id}.xml", [CLASSES[label - 1] for label in labels])
    sets = base / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    for part in ("train", "val"):
        (sets / f"{part}.txt").write_text("".join(f"{image_id}\n" for image_id in lists[part]))
    return root


def _write_voc_xml(path: Path, names: Iterable[str]) -> None:
    objects = "".join(
        f"<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part></object>" for name in names
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{objects}</annotation>")


def make_table(part: Path, tags: dict[str, str], *, masks: bool = True, encoding: str = "utf-8") -> Path:
    """`images/`, `tags.csv` and `masks/` below `part`, returned: image file name → tags joined by |.

    Mask values follow the alphabetical order of the tags.
    """
    classes = sorted({tag for joined in tags.values() for tag in joined.split("|") if tag})
    for index, (name, joined) in enumerate(tags.items()):
        image, mask = scene(index, [classes.index(tag) + 1 for tag in joined.split("|") if tag])
        save_image(part / "images" / name, image)
        if masks:
            save_mask((part / "masks" / name).with_suffix(".png"), mask)
    with (part / "tags.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([("image", "tags"), *tags.items()])
    return part


def make_folder(root: Path, *, train: int = 8, val: int = 4) -> Path:
    """`train/` and `val/` with tables of three classes and `classes.txt`; no `val/` where `val` is 0."""
    for part, count in (("train", train), ("val", val)):
        tags = {f"{part}_{i}.jpg": ("cat", "dog", "ant|cat")[i % 3] for i in range(count)}
        if tags:
            make_table(root / part, tags)
    (root / "classes.txt").write_text("ant\ncat\ndog\n")
    return root


def make_class_folders(root: Path, images: dict[str, Sequence[str]]) -> Path:
    """One sub-folder per class: class → file names."""
    number = 0
    for name, files in images.items():
        for file in files:
            save_image(root / name / file, scene(number, [1])[0])
            number += 1
    return root


def make_coco(root: Path, *, train: int = 6, val: int = 3) -> Path:
    """COCO 2014 below `root` with three categories (ids 3, 7, 20); the last image of each split has no object.

    Every other image has one rectangle of category i % 3 as a polygon; image 0 also has a crowd over the whole image
    and a smaller object of the last category inside the first, as RLE.
    """
    categories = [{"id": 20, "name": "boat"}, {"id": 3, "name": "kite"}, {"id": 7, "name": "apple"}]
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for index in range(count):
            name = f"COCO_{split}2014_{index:012d}.jpg"
            image, _ = scene(index, [1 + index % 3])
            save_image(root / f"{split}2014" / name, image)
            images.append({"id": 100 + index, "file_name": name, "height": 40, "width": 56})
            if index < count - 1:
                annotations += _coco_objects(index)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    return root


def _coco_objects(index: int) -> list[dict]:
    category = (3, 7, 20)[index % 3]
    polygon = {"image_id": 100 + index, "category_id": category, "iscrowd": 0, "area": 400,
               "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}  # fmt: skip
    if index:
        return [polygon]
    column = [0] * 15 * 40 + [0] * 15 + [1] * 5 + [0] * 20 + [0] * 40 * 40  # x 15, y 15…19 of 56×40, column by column
    small = {"image_id": 100, "category_id": 20, "iscrowd": 0, "area": 5,
             "segmentation": {"size": [40, 56], "counts": _runs(column)}}  # fmt: skip
    crowd = {"image_id": 100, "category_id": 7, "iscrowd": 1, "area": 9,
             "segmentation": {"size": [40, 56], "counts": [0, 40 * 56]}}  # fmt: skip
    return [small, polygon, crowd]


def _runs(bits: list[int]) -> list[int]:
    changes = np.flatnonzero(np.diff([0, *bits])).tolist()
    return np.diff([0, *changes, len(bits)]).tolist()
