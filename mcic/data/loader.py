"""Batches for training and single images for evaluation.

What is in a batch is a pure function of (seed, epoch, step): neither the number of worker processes nor the number of
ranks nor a resume changes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from mcic.data.base import IGNORE, Batch, Dataset
from mcic.data.images import normalize
from mcic.data.saliency import SaliencySource
from mcic.data.transforms import Augment


def default_workers(requested: int | None, dataset: Dataset) -> int:
    """Loader processes: as requested, else none for images that have no file, else up to 8, leaving one core free."""
    if requested is not None:
        return requested
    if len(dataset) == 0 or dataset.path(0) is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(0, cores - 1))


class TrainLoader:
    """Augmented training batches of one rank."""

    def __init__(
        self,
        dataset: Dataset,
        saliency: SaliencySource | None,
        *,
        size: int,
        scale: tuple[float, float],
        flip: bool,
        color_jitter: float,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            dataset: the training images.
            saliency: their saliency maps, or None for none.
            size, scale, flip, color_jitter: the augmentation, see `Augment`.
            batch_size: images per step, over all ranks.
            seed: of the order and of the augmentation, 0 or more.
            workers: loader processes; 0 loads in this one.
            rank, world_size: which share of every batch is this process's.

        Raises:
            ValueError: the batch does not split evenly over the ranks, or the data set does not fill one.
        """
        if batch_size % world_size:
            raise ValueError(f"--train.batch-size must be a multiple of the {world_size} processes, got {batch_size}")
        if len(dataset) < batch_size:
            raise ValueError(
                f"{dataset.name} has {len(dataset)} training images, fewer than one batch of {batch_size}: "
                "lower --train.batch-size or add images"
            )
        if seed < 0:
            raise ValueError(f"--train.seed must be 0 or more, got {seed}")
        self.steps = len(dataset) // batch_size
        augment = Augment(size=size, scale=scale, flip=flip, color_jitter=color_jitter, seed=seed)
        share = batch_size // world_size
        self._order = _Order(len(dataset), self.steps, batch_size, slice(rank * share, (rank + 1) * share), seed)
        self._batches = _loader(_TrainBatches(dataset, saliency, augment), self._order, workers)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from step `start` on; the steps before it cost nothing.

        Raises:
            ValueError: an image, mask or saliency map cannot be read, or `start` lies outside the epoch.
        """
        if not 0 <= start <= self.steps:
            raise ValueError(f"an epoch has {self.steps} steps, cannot start at {start}")
        self._order.epoch, self._order.start = epoch, start
        for fields in self._batches:
            yield Batch(*_checked(fields))


class _Order(Sampler[tuple[int, np.ndarray]]):
    """(epoch, this rank's indices) for every step; global batch i is perm[i·B : (i+1)·B]."""

    def __init__(self, num_images: int, steps: int, batch_size: int, share: slice, seed: int) -> None:
        self.num_images, self.steps, self.batch_size, self.share, self.seed = num_images, steps, batch_size, share, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        # The fourth word keeps this stream apart from those of the images, [seed, epoch, index].
        permutation = np.random.default_rng([self.seed, self.epoch, 0, 1]).permutation(self.num_images)
        for step in range(self.start, self.steps):
            batch = permutation[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.epoch, batch[self.share]


class _TrainBatches(TorchDataset[Any]):
    """The fields of a `Batch` as a tuple, which PyTorch knows how to pin."""

    def __init__(self, dataset: Dataset, saliency: SaliencySource | None, augment: Augment) -> None:
        self.dataset, self.saliency, self.augment = dataset, saliency, augment

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[Tensor | None, ...] | _Mistake:
        epoch, indices = key
        try:
            samples = [
                self.augment(*_read(self.dataset, self.saliency, int(i)), epoch=epoch, index=int(i)) for i in indices
            ]
        except ValueError as error:
            return _Mistake(str(error))
        return (
            torch.stack([sample.image for sample in samples]),
            torch.from_numpy(self.dataset.tags[indices]),
            None if self.saliency is None else torch.stack([sample.saliency for sample in samples]),
            torch.stack([sample.mask for sample in samples]),
            torch.stack([sample.valid for sample in samples]),
            torch.from_numpy(indices.astype(np.int64)),
        )


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One image as it is, for evaluation.

    Attributes:
        index: its place in the data set.
        image: f32 [3, H, W], normalised.
        pixels: uint8 [H, W, 3] RGB.
        tags: bool [L].
        saliency: f32 [H, W] in 0…1, or None.
        mask: uint8 [H, W] ground truth, or None.
    """

    index: int
    image: Tensor
    pixels: np.ndarray
    tags: Tensor
    saliency: Tensor | None
    mask: Tensor | None


def eval_items(
    dataset: Dataset, saliency: SaliencySource | None, *, indices: Sequence[int] | None = None, workers: int = 0
) -> Iterator[EvalItem]:
    """The images `indices` (all when None) in that order, each at its full size.

    Raises:
        ValueError: an image, mask or saliency map cannot be read.
    """
    chosen = range(len(dataset)) if indices is None else [int(index) for index in indices]
    for item in _loader(_EvalItems(dataset, saliency), chosen, workers, keep_workers=False):
        yield _checked(item)


class _EvalItems(TorchDataset[Any]):
    def __init__(self, dataset: Dataset, saliency: SaliencySource | None) -> None:
        self.dataset, self.saliency = dataset, saliency

    def __getitem__(self, index: int) -> EvalItem | _Mistake:
        try:
            pixels, saliency, mask = _read(self.dataset, self.saliency, index)
        except ValueError as error:
            return _Mistake(str(error))
        return EvalItem(
            index=index,
            image=normalize(pixels),
            pixels=pixels,
            tags=torch.from_numpy(self.dataset.tags[index].copy()),
            saliency=None if saliency is None else torch.from_numpy(saliency),
            mask=None if mask is None else torch.from_numpy(mask),
        )


def _read(
    dataset: Dataset, saliency: SaliencySource | None, index: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """An image with its saliency map and its mask, after checking that the mask belongs to it."""
    image, mask = dataset.image(index), dataset.mask(index)
    if mask is not None:
        where = f"the mask of image {dataset.ids[index]} ({dataset.name})"
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{where} is {_size(mask)} pixels, its image {_size(image)}: they must be of one size")
        largest = int(mask.max(where=mask != IGNORE, initial=0))
        if largest > len(dataset.classes):
            raise ValueError(f"{where} has the value {largest}: expected 0…{len(dataset.classes)} or {IGNORE} (ignore)")
    return image, None if saliency is None else saliency(dataset, index, image), mask


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"


def _loader(dataset: TorchDataset[Any], order: Any, workers: int, *, keep_workers: bool = True) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
        persistent_workers=keep_workers and workers > 0,
    )


def _as_is(item: Any) -> Any:
    return item


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class _Mistake:
    """What a worker returns for a ValueError: raised there, PyTorch would bury the sentence in a traceback."""

    sentence: str


def _checked(item: Any) -> Any:
    if isinstance(item, _Mistake):
        raise ValueError(item.sentence)
    return item
