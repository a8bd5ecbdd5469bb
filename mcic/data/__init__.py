"""The door to data sets, saliency maps and loaders."""

from __future__ import annotations

from pathlib import Path

from mcic.config import DataConfig
from mcic.data import coco, folder, shards, voc
from mcic.data.base import IGNORE, Batch, Dataset, Splits
from mcic.data.dropped import write_quarantine
from mcic.data.loader import EvalItem, TrainLoader, default_workers, eval_items
from mcic.data.saliency import SaliencySource, build_saliency
from mcic.data.targets import GroundTruth, SavedMasks, Targets

__all__ = [
    "IGNORE",
    "Batch",
    "Dataset",
    "EvalItem",
    "GroundTruth",
    "SaliencySource",
    "SavedMasks",
    "Splits",
    "Targets",
    "TrainLoader",
    "build_data",
    "build_saliency",
    "default_workers",
    "eval_items",
    "write_quarantine",
]

SHAPES_TRAIN, SHAPES_VAL = 1200, 200
"""how many images `shapes` makes unless told otherwise"""


def build_data(config: DataConfig) -> Splits:
    """The training and validation set that `config` describes.

    Raises:
        ValueError: the folder is missing or not laid out as expected, or holds what the data set does not know.
    """
    for flag, count in (("train-images", config.train_images), ("val-images", config.val_images)):
        if count is not None and count < 1:
            raise ValueError(f"--data.{flag} must be 1 or more, got {count}")
    if config.name == "shapes":
        if given := config.root or config.val_root:
            raise ValueError(f"shapes are made at run time and read no folder, got {given}: for photographs train with "
                             "the preset folder, for VOC and COCO with theirs")  # fmt: skip
        splits = _shapes(config)
    else:
        splits = _read(config)
        splits.train.subset(config.train_images)
        splits.val.subset(config.val_images)
    splits.train.long_side = splits.val.long_side = config.long_side or 0
    return splits


def _shapes(config: DataConfig) -> Splits:
    from mcic.data.shapes import Shapes

    return Splits(
        Shapes("train", count=config.train_images or SHAPES_TRAIN),
        Shapes("val", count=config.val_images or SHAPES_VAL),
    )


def _read(config: DataConfig) -> Splits:
    layout = {"voc12": voc.LAYOUT, "coco14": coco.LAYOUT, "folder": folder.LAYOUT}[config.name]
    if config.root is None:
        raise ValueError(f"{config.name} needs --data.root: {layout}")
    if config.name == "folder" and shards.names_shards(config.root):
        return shards.Shards.splits(
            config.root, val_root=config.val_root, val_share=config.val_share, max_bad_share=config.max_bad_share,
            folder=shards.store_folder(config.cache), limit=round(config.shard_cache * 2**30),
        )  # fmt: skip
    if config.val_root is not None:
        raise ValueError(f"--data.val-root is for sets in tars: validation images of {config.root} are those in val/")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        place = "" if root.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"--data.root {config.root} is no folder{place}: expected {layout}")
    if config.name == "voc12":
        return Splits(*(voc.VOC12(config.root, part, follow_links=config.follow_links) for part in ("train", "val")))
    if config.name == "coco14":
        return coco.COCO14.splits(config.root, follow_links=config.follow_links)
    return folder.Folder.splits(
        config.root, config.val_share, max_bad_share=config.max_bad_share, follow_links=config.follow_links
    )
