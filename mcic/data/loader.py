"""Batches for training and single images for evaluation.

What is in a batch is a pure function of (seed, epoch, step): neither the number of worker processes nor the number of
ranks nor a resume changes it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from mcic import distributed
from mcic.data.base import IGNORE, Batch, Dataset
from mcic.data.images import normalize
from mcic.data.saliency import SaliencySource
from mcic.data.targets import GroundTruth, Targets
from mcic.data.transforms import BILINEAR, NEAREST, Augment, fitted
from mcic.stop import StopRequest


def default_workers(requested: int | None, dataset: Dataset) -> int:
    """Loader processes of this rank: as requested, else none for images that have no file, else up to 8.

    The ranks of a machine share its cores, and each keeps one for itself.
    """
    if requested is not None:
        return requested
    if not dataset.stored:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(0, cores // distributed.local_world_size() - 1))


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
        targets: Targets | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        """
        Args:
            dataset: the training images.
            saliency: their saliency maps, or None for none.
            size, scale, flip, color_jitter: the augmentation, see `Augment`.
            batch_size: images per step, over all ranks.
            seed: of the order and of the augmentation, 0 or more.
            workers: loader processes; 0 loads in this one.
            targets: the masks to train with; None where tags supervise: then no mask is read.
            rank, world_size: which share of every batch is this process's.
            accumulate: micro-batches of a batch, which follow each other in it; all ranks share each of them.

        Raises:
            ValueError: the batch does not split evenly over ranks and micro-batches, or the data set does not fill one.
        """
        if batch_size % (world_size * accumulate):
            raise ValueError(
                "--train.batch-size must be a multiple of accumulation steps times processes, "
                f"{accumulate} × {world_size}, got {batch_size}"
            )
        if len(dataset) < batch_size:
            raise ValueError(
                f"{dataset.name} has {len(dataset)} training images, fewer than one batch of {batch_size}: "
                "lower --train.batch-size or add images"
            )
        if seed < 0:
            raise ValueError(f"--train.seed must be 0 or more, got {seed}")
        self.steps = len(dataset) // batch_size
        augment = Augment(size=size, scale=scale, flip=flip, color_jitter=color_jitter, seed=seed)
        share = np.arange(batch_size).reshape(accumulate, world_size, -1)[:, rank].ravel()
        self._order = _Order(dataset, self.steps, batch_size, share, seed)
        self._dataset = _TrainBatches(_Reader(dataset, saliency, targets), augment)
        self._batches = _loader(self._dataset, self._order, workers)

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

    def batch(self, epoch: int, step: int) -> Batch:
        """One batch of an epoch by itself, made in this process; iterations that are going on do not notice."""
        return Batch(*_checked(self._dataset[epoch, self._order.indices(epoch, step)]))


class _Order(Sampler[tuple[int, np.ndarray]]):
    """(epoch, this rank's indices) for every step; global batch i is perm[i·B : (i+1)·B], of which this rank's are the
    places `share`."""

    def __init__(self, dataset: Dataset, steps: int, batch_size: int, share: np.ndarray, seed: int) -> None:
        self.dataset, self.steps, self.batch_size, self.share, self.seed = dataset, steps, batch_size, share, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch = self.epoch
        permutation = self._permutation(epoch)
        for step in range(self.start, self.steps):
            self.dataset.will_read(permutation[step * self.batch_size :])
            yield epoch, self._of_step(permutation, step)

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """This rank's images of one step."""
        return self._of_step(self._permutation(epoch), step)

    def _permutation(self, epoch: int) -> np.ndarray:
        # The fourth word keeps this stream apart from those of the images, [seed, epoch, index].
        return self.dataset.shuffled(np.random.default_rng([self.seed, epoch, 0, 1]))

    def _of_step(self, permutation: np.ndarray, step: int) -> np.ndarray:
        return permutation[step * self.batch_size : (step + 1) * self.batch_size][self.share]


class _TrainBatches(TorchDataset[Any]):
    """The fields of a `Batch` as a tuple, which PyTorch knows how to pin."""

    def __init__(self, reader: _Reader, augment: Augment) -> None:
        self.reader, self.augment = reader, augment

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[Tensor | None, ...] | _Mistake:
        epoch, indices = key
        samples, reader = [], self.reader
        for index in map(int, indices):
            try:
                photo = reader(index)
                layers = (photo.image, photo.saliency, photo.mask, photo.confidence)
                samples.append(self.augment(*layers, epoch=epoch, index=index))
            except (ValueError, OSError) as error:
                return _Mistake.of(error, reader.dataset, index)

        def stacked(name: str) -> Tensor | None:
            tensors = [getattr(sample, name) for sample in samples]
            return None if tensors[0] is None else torch.stack(tensors)

        return (
            stacked("image"),
            torch.from_numpy(reader.dataset.tags[indices]),
            stacked("saliency"),
            None if reader.targets is None else stacked("mask"),
            stacked("confidence"),
            stacked("valid"),
            torch.from_numpy(indices.astype(np.int64)),
        )


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One image without augmentation, for evaluation.

    Attributes:
        index: its place in the data set.
        full_size: (height, width) of the upright image, before it was brought to `long_side`.
        image: f32 [3, H, W], normalised.
        pixels: uint8 [H, W, 3] RGB.
        tags: bool [L].
        saliency: f32 [H, W] in 0…1, or None.
        mask: uint8 [H, W] ground truth, or None.
    """

    index: int
    full_size: tuple[int, int]
    image: Tensor
    pixels: np.ndarray
    tags: Tensor
    saliency: Tensor | None
    mask: Tensor | None


def eval_items(
    dataset: Dataset, saliency: SaliencySource | None, *, indices: Sequence[int] | None = None, workers: int = 0
) -> Iterator[EvalItem]:
    """The images `indices` (all when None) in that order, whole and brought to `dataset.long_side`, with ground truth.

    Args:
        dataset, saliency: as for `TrainLoader`.
        indices: places in the data set.
        workers: loader processes; 0 loads in this one.

    Raises:
        ValueError: an image, mask or saliency map cannot be read.
    """
    chosen = range(len(dataset)) if indices is None else [int(index) for index in indices]
    items = _EvalItems(_Reader(dataset, saliency, GroundTruth()))
    for item in _loader(items, chosen, workers, keep_workers=False):
        yield _checked(item)


class _EvalItems(TorchDataset[Any]):
    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> EvalItem | _Mistake:
        try:
            photo = self.reader(index)
        except (ValueError, OSError) as error:
            return _Mistake.of(error, self.reader.dataset, index)
        return EvalItem(
            index=index,
            full_size=photo.full_size,
            image=normalize(photo.image),
            pixels=photo.image,
            tags=torch.from_numpy(self.reader.dataset.tags[index].copy()),
            saliency=None if photo.saliency is None else torch.from_numpy(photo.saliency),
            mask=None if photo.mask is None else torch.from_numpy(photo.mask),
        )


@dataclass(frozen=True, slots=True)
class _Photo:
    """An image uint8 [H, W, 3] and what belongs to it: saliency f32, mask uint8 and confidence f32 [H, W], or None."""

    full_size: tuple[int, int]
    image: np.ndarray
    saliency: np.ndarray | None
    mask: np.ndarray | None
    confidence: np.ndarray | None


class _Reader:
    """Reads an image with all that belongs to it, checks that it does, and brings it to the data set's size."""

    def __init__(self, dataset: Dataset, saliency: SaliencySource | None, targets: Targets | None) -> None:
        self.dataset, self.saliency, self.targets = dataset, saliency, targets

    def __call__(self, index: int) -> _Photo:
        image, long_side = self.dataset.image(index), self.dataset.long_side
        mask, confidence = (None, None) if self.targets is None else self.targets(self.dataset, index)
        if mask is not None:
            self._check(mask, image, index)
            mask = fitted(mask, long_side, NEAREST)
        if confidence is not None:
            if confidence.shape != image.shape[:2]:
                raise ValueError(f"the confidence of image {self.dataset.ids[index]} is {_size(confidence)} pixels, "
                                 f"its image {_size(image)}: they must be of one size")  # fmt: skip
            confidence = fitted(confidence, long_side, BILINEAR)
        full_size, image = image.shape[:2], fitted(image, long_side, BILINEAR)
        saliency = None if self.saliency is None else self.saliency(self.dataset, index, image)
        return _Photo(full_size, image, saliency, mask, confidence)

    def _check(self, mask: np.ndarray, image: np.ndarray, index: int) -> None:
        where = f"the mask of image {self.dataset.ids[index]} ({self.dataset.name})"
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{where} is {_size(mask)} pixels, its image {_size(image)}: they must be of one size")
        largest, classes = int(mask.max(where=mask != IGNORE, initial=0)), len(self.dataset.classes)
        if largest > classes:
            raise ValueError(f"{where} has the value {largest}: expected 0…{classes} or {IGNORE} (ignore)")


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
        worker_init_fn=_settle_worker,
        persistent_workers=keep_workers and workers > 0,
    )


def _as_is(item: Any) -> Any:
    return item


def _settle_worker(_worker: int) -> None:
    """One thread, and deaf to what asks a run to stop, which may come to all its processes; the run
    still needs the batches of its step, and ends its workers itself."""
    torch.set_num_threads(1)
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """At exit multiprocessing would ask what workers are left by SIGTERM, and wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would report their death as an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
            process.join()


@dataclass(frozen=True, slots=True)
class _Mistake:
    """What a worker returns for a ValueError: raised there, PyTorch would bury the sentence in a traceback."""

    sentence: str

    @classmethod
    def of(cls, error: ValueError | OSError, dataset: Dataset, index: int) -> _Mistake:
        """The error's sentence, with the image in front where it names neither that nor its file."""
        said, image = str(error), f"image {dataset.ids[index]}"
        named = image in said or str(dataset.path(index) or image) in said
        return cls(said if named else f"{image} ({dataset.name}): {said}")


def _checked(item: Any) -> Any:
    if isinstance(item, _Mistake):
        raise ValueError(item.sentence)
    return item
