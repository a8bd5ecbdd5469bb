"""What a data set is, and what it hands to a trainer.

A data set is a class with the names, the palette and the tags; everything that depends on the number of classes
comes from it. Mask value 0 is background, value i ≥ 1 is `classes[i - 1]`, 255 is ignore.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mcic.data.dropped import Dropped
from mcic.pictures import opened

IGNORE = 255


class Dataset(ABC):
    """Images with tags, and masks where there are any; read one image at a time by its index.

    Attributes:
        name: what reports call it.
        classes: names of the L object classes; background is not one of them.
        palette: uint8 [L + 1, 3], RGB of every mask value.
        ids: one unique, file-name-like string per image.
        tags: bool [len(self), L].
        long_side: pixels that loaders bring the longer side of images and their masks to; 0: as it is.
        dropped: what was left out of this split and the other; nothing where a broken file refuses the data set.
    """

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    ids: list[str]
    tags: np.ndarray
    long_side: int = 0
    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB, turned the way a person sees it."""

    @abstractmethod
    def mask(self, index: int) -> np.ndarray | None:
        """uint8 [H, W] ground truth (for evaluation, or `method.supervision full`), or None where there is none."""

    def has_mask(self, index: int) -> bool:
        """Whether there is ground truth of an image, without reading it."""
        return True

    def path(self, index: int) -> Path | None:
        """The image's file, or None where it has none."""
        return None

    def saliency(self, index: int) -> np.ndarray | None:
        """f32 [h, w] in 0…1, 1 salient: the map that came with the image, or None where none did."""
        return None

    def size(self, index: int) -> tuple[int, ...]:
        """Both sides of an image in pixels, in any order: from the header of its file where it has one."""
        path = self.path(index)
        if path is None:
            return self.image(index).shape[:2]
        with opened(path, "image") as image:
            return image.size

    @property
    def stored(self) -> bool:
        """Whether images are read from somewhere, so that loader processes and kept saliency maps save time."""
        return len(self) > 0 and self.path(0) is not None

    def shuffled(self, random: np.random.Generator) -> np.ndarray:
        """An order for an epoch, int64 [len(self)], each image once, drawn from `random`."""
        return random.permutation(len(self))

    def will_read(self, indices: np.ndarray) -> None:  # noqa: B027
        """A hint: these images are wanted next, in this order."""

    def subset(self, count: int | None) -> None:
        """Keep only `count` images, evenly spread over the set (all when None)."""
        if count is None or count >= len(self):
            return
        keep = np.linspace(0, len(self) - 1, count).round().astype(int)
        self._keep(keep)

    def measured(self, count: int | None) -> Self:
        """A copy with `count` of the images that have ground truth, evenly spread (all of them when None)."""
        part = copy.copy(self)
        part._keep(np.flatnonzero([self.has_mask(index) for index in range(len(self))]))
        part.subset(count)
        return part

    def _keep(self, indices: np.ndarray) -> None:
        """Restrict to `indices`; a subclass with more per-image state extends this."""
        self.ids = [self.ids[i] for i in indices]
        self.tags = self.tags[indices]


@dataclass(frozen=True, slots=True)
class Splits:
    """The training and the validation part of a data set; they share classes and palette."""

    train: Dataset
    val: Dataset


@dataclass(frozen=True, slots=True)
class Batch:
    """B augmented images as tensors.

    Attributes:
        images: f32 [B, 3, H, W], minus ImageNet's mean, divided by its standard deviation.
        tags: bool [B, L].
        saliency: f32 [B, H, W] in 0…1, 1 salient, or None.
        masks: uint8 [B, H, W] to be trained with, 255 where there is none; None where tags supervise.
        confidence: f32 [B, H, W] in 0…1 of these masks, or None.
        valid: bool [B, H, W], False where the crop padded.
        indices: int64 [B], the images' places in the data set.
    """

    images: Tensor
    tags: Tensor
    saliency: Tensor | None
    masks: Tensor | None
    confidence: Tensor | None
    valid: Tensor
    indices: Tensor

    def to(self, device: object, *, non_blocking: bool = True) -> Batch:
        """The same batch on `device`, images in channels-last order."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        images = self.images.to(device, non_blocking=non_blocking, memory_format=torch.channels_last)
        return Batch(images, *(move(getattr(self, name)) for name in self.__slots__[1:]))
