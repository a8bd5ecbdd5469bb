"""Pictures of what a model does with an image: heatmap, masks, prediction, attention, and what each pixel read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcic.data import Dataset, EvalItem, SaliencySource, eval_items
from mcic.evaluate import PixelOutputs, at_pixels, mask_candidates
from mcic.inference import to_pixels
from mcic.metrics import ConfusionMatrix
from mcic.model import MCIC
from mcic.objective import Objective
from mcic.preview import CellReading, Example, Source, colorize, contact_sheet, heat, overlay, write_examples
from mcic.pseudo import normalized_heatmap, with_background

MASK_TITLES = {"cam": "CAM mask", "seg": "control", "context": "context mask", "merged": "merged mask"}


NUM_EXAMPLES = 24
"""training images in the gallery of a run's report, evenly spread over the data set"""
_TOP = 5  # sources named for each pixel
_CELLS = 25  # most rows and columns of the grid that a reading is stored on
_THUMBNAILS, _THUMBNAIL_SIDE = 120, 96  # how many images of the bank are shown, and their longest side in pixels
_CHUNK = 2**24  # weights in memory at a time


def draw_previews(
    path: Path, model: MCIC, objective: Objective, items: Iterable[EvalItem], dataset: Dataset, *, device: torch.device
) -> None:
    """Write one sheet with a row for each image to `path` (PNG)."""
    examples = [example_of(model, objective, item, dataset, device) for item in items]
    titles = ["image", *dict.fromkeys(name for example in examples for name in example.panels)]
    rows = [[{"image": e.pixels, **e.panels}.get(title) for title in titles] for e in examples]
    captions = [f"{example.id}: {', '.join(example.tags) or 'no tag'}" for example in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(rows, titles, captions)).save(path)


def draw_examples(
    folder: Path, model: MCIC, objective: Objective, dataset: Dataset, saliency: SaliencySource | None, *,
    device: torch.device,
) -> None:  # fmt: skip
    """Write the examples of a run's report below `folder`.

    Args:
        folder: of the run.
        model: whose outputs are shown.
        objective: makes the masks.
        dataset: the training images, all of them: the ids in the bank are places in it.
        saliency: of these images, or None.
        device: where the model is.
    """
    count = min(NUM_EXAMPLES, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    items = eval_items(dataset, saliency, indices=chosen)
    examples = [example_of(model, objective, item, dataset, device) for item in items]
    sources, thumbnails = (), {}
    if model.memory is not None:
        bank = _Bank.of(model, dataset)
        sources, thumbnails = bank.sources, _thumbnails(examples, bank, dataset)
    write_examples(folder, examples, sources=sources, thumbnails=thumbnails)


@torch.no_grad()
def example_of(model: MCIC, objective: Objective, item: EvalItem, dataset: Dataset, device: torch.device) -> Example:
    """One image's panels, with the model in evaluation mode; it is left as it was."""
    was_training = model.training
    model.eval()
    images, tags = item.image[None].to(device), item.tags[None].to(device)
    saliency = None if item.saliency is None else item.saliency[None].to(device)
    outputs = at_pixels(model, images, tags)
    logits = outputs.prediction.logits[0]
    masks = mask_candidates(objective, outputs, tags, saliency, images)
    masks = {MASK_TITLES[name]: mask[0].cpu() for name, mask in masks.items() if name != "seg" or len(masks) < 4}
    masks["prediction"] = logits.argmax(0).cpu()
    panels = {"heatmap": heat(item.pixels, _heatmap(outputs, tags))}
    panels |= {name: overlay(item.pixels, mask.numpy(), dataset.palette) for name, mask in masks.items()}
    if item.mask is not None:
        panels["ground truth"] = overlay(item.pixels, item.mask.numpy(), dataset.palette)
    reading = None
    if model.memory is not None:
        read = _read(model, outputs, tags, _Bank.of(model, dataset))
        size = item.pixels.shape[:2]
        panels["attention"] = _attention(read, model.network.stride, size, dataset.palette)
        reading = _cells(read, model.network.stride, size)
    model.train(was_training)
    return Example(
        id=dataset.ids[item.index],
        tags=tuple(name for name, there in zip(dataset.classes, item.tags.tolist(), strict=True) if there),
        pixels=item.pixels,
        panels=panels,
        iou={name: _miou(mask, item.mask, len(dataset.classes) + 1) for name, mask in masks.items()},
        uncertainty=100 * (1 - logits.softmax(0).amax(0)).mean().item(),
        reading=reading,
    )


@dataclass(frozen=True, slots=True)
class _Bank:
    """The R sources of a bank's entries.

    Attributes:
        sources: R of them.
        images: R places in the data set, -1 where unknown.
        source_of: int64 [K, S], the source of every slot; R where the slot is empty.
        class_of: int64 [R].
    """

    sources: list[Source]
    images: list[int]
    source_of: Tensor
    class_of: Tensor

    @classmethod
    def of(cls, model: MCIC, dataset: Dataset) -> _Bank:
        """What a model's bank holds, its contexts of one class and image counted together."""
        ids, counts = model.memory.ids, model.memory.counts
        stored = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        known = ids.where((ids >= 0) & (ids < len(dataset)), -1)
        classes = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        pairs = torch.stack([classes[stored], known[stored]])
        pairs, places, contexts = pairs.unique(dim=1, return_inverse=True, return_counts=True)
        source_of = torch.full_like(ids, pairs.shape[1])
        source_of[stored] = places
        names, images = ("background", *dataset.classes), pairs[1].tolist()
        sources = [
            Source(names[label], None if image < 0 else dataset.ids[image], count)
            for label, image, count in zip(pairs[0].tolist(), images, contexts.tolist(), strict=True)
        ]
        return cls(sources, images, source_of, pairs[0])


@dataclass(frozen=True, slots=True)
class _Read:
    """What every pixel of an image's feature grid read.

    Attributes:
        by_class: [1, K, h, w], the weights of each class.
        weights: [h, w, k], the largest of a source.
        sources: int64 [h, w, k], which source's.
    """

    by_class: Tensor
    weights: Tensor
    sources: Tensor


def _read(model: MCIC, outputs: PixelOutputs, tags: Tensor, bank: _Bank) -> _Read:
    memory, features = model.memory, outputs.prediction.features
    own = with_background(tags)[0].nonzero()[:, 0]  # no weight falls on another class
    entries, counts = memory.entries[own], memory.counts[own]
    everything = torch.ones_like(own, dtype=torch.bool)[None]
    source_of, num_sources = bank.source_of[own].flatten(), len(bank.sources)
    top = min(_TOP, num_sources)
    by_class, weights, sources = [], [], []
    for pixels in features.flatten(2).split(max(1, _CHUNK // source_of.numel()), 2):
        dense = model.propagation.weights(pixels[..., None], entries, counts, everything)[0].flatten(1)
        by_source = dense.new_zeros(len(dense), num_sources + 1).index_add_(1, source_of, dense)[:, :-1]
        shares = dense.new_zeros(len(dense), len(memory.counts)).index_add_(1, bank.class_of, by_source)
        largest, places = by_source.topk(top)
        by_class.append(shares)
        weights.append(largest)
        sources.append(places)
    grid = features.shape[-2:]
    return _Read(
        torch.cat(by_class).T.unflatten(1, grid)[None],
        torch.cat(weights).unflatten(0, grid),
        torch.cat(sources).unflatten(0, grid),
    )


def _cells(read: _Read, stride: int, size: tuple[int, int]) -> CellReading | None:
    """The reading at the feature nearest to the middle of every cell; None where there was nothing to read."""
    if read.weights.numel() == 0 or not read.weights.any():
        return None

    def nearest(side: int) -> np.ndarray:
        cells = min(_CELLS, 1 + (side - 1) // stride)
        return np.rint((np.arange(cells) + 0.5) * side / cells / stride).astype(int).clip(0, (side - 1) // stride)

    rows, columns = (nearest(side) for side in size)
    sources, weights = read.sources.cpu().numpy(), read.weights.cpu().numpy()
    return CellReading(sources[rows][:, columns], weights[rows][:, columns])


def _thumbnails(examples: Sequence[Example], bank: _Bank, dataset: Dataset) -> dict[str, np.ndarray]:
    """The images that the examples read most, small, by name."""
    weight: Counter[int] = Counter()
    for reading in (example.reading for example in examples if example.reading is not None):
        sums = np.bincount(reading.sources.ravel(), reading.weights.ravel(), minlength=len(bank.images))
        for image, value in zip(bank.images, sums.tolist(), strict=True):
            if image >= 0 and value > 0:
                weight[image] += value
    return {dataset.ids[image]: _small(dataset.image(image)) for image, _ in weight.most_common(_THUMBNAILS)}


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return np.asarray(image)


def _heatmap(outputs: PixelOutputs, tags: Tensor) -> np.ndarray:
    return normalized_heatmap(outputs.prediction.heatmap, tags)[0].amax(0).cpu().numpy()


def _attention(read: _Read, stride: int, size: tuple[int, int], palette: np.ndarray) -> np.ndarray:
    """Each pixel in the colour of the class it reads most (background grey), brighter where it reads little else."""
    share, label = to_pixels(read.by_class, stride, size)[0].max(0)
    palette = np.vstack([np.full((1, 3), 120, np.uint8), palette[1:]])
    colors = colorize(label.cpu().numpy().astype(np.uint8), palette)
    return np.rint(colors * share.cpu().numpy()[..., None]).astype(np.uint8)


def _miou(mask: Tensor, truth: Tensor | None, num_classes: int) -> float | None:
    if truth is None:
        return None
    confusion = ConfusionMatrix(num_classes)
    confusion.update(mask, truth)
    return confusion.miou()
