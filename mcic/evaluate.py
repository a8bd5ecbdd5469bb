"""Quality of the network on val and of the masks on the training images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcic import distributed
from mcic.build import in_words
from mcic.config import MethodConfig
from mcic.data import EvalItem, default_workers, eval_items
from mcic.inference import dense_protocol, pad_to_grid, to_pixels
from mcic.metrics import ConfusionMatrix
from mcic.model import MCIC, Augmented, Prediction
from mcic.objective import Objective
from mcic.pseudo import with_background
from mcic.restore import restore_run

BATCH_PIXELS = 2**18
"""images of one size are evaluated together up to this many pixels"""

SMALLER_IMAGES = "evaluated are whole images: --data.long-side must be lower, or --eval.protocol single"
"""what to do where the memory does not hold an evaluation"""

MASK_NAMES = ("cam", "seg", "context", "merged")
"""M; the M' rule on s without the bank (the control); M'; M''"""


@dataclass(frozen=True, slots=True)
class PixelOutputs:
    """What the model says at every pixel of B images: prediction, and what it says after reading the bank, if any."""

    prediction: Prediction
    augmented: Augmented | None


@torch.no_grad()
def at_pixels(model: MCIC, images: Tensor, tags: Tensor) -> PixelOutputs:
    """Run the model at one scale and bring its scores to the pixels of `images` [B, 3, H, W]; features stay coarse."""
    stride, size = model.network.stride, tuple(images.shape[-2:])
    prediction = model(pad_to_grid(images, stride))
    augmented = model.read(prediction, tags) if model.memory is not None else None
    prediction = replace(
        prediction,
        heatmap=to_pixels(prediction.heatmap, stride, size),
        logits=to_pixels(prediction.logits, stride, size),
    )
    if augmented is not None:
        heatmap = None if augmented.heatmap is None else to_pixels(augmented.heatmap, stride, size)
        augmented = replace(augmented, logits=to_pixels(augmented.logits, stride, size), heatmap=heatmap)
    return PixelOutputs(prediction, augmented)


def mask_candidates(
    objective: Objective, outputs: PixelOutputs, tags: Tensor, saliency: Tensor | None, images: Tensor
) -> dict[str, Tensor]:
    """Name of `MASK_NAMES` → uint8 [B, H, W], as far as the configuration makes them."""
    masks = objective.masks(outputs.prediction, outputs.augmented, tags, saliency, None, images).named()
    masks["seg"] = objective.context_mask(outputs.prediction.logits, tags, saliency, None, images)
    return {name: masks[name] for name in MASK_NAMES if name in masks}


@torch.no_grad()
def evaluate_network(
    model: MCIC, items: Iterable[EvalItem], *, protocol: str, device: torch.device
) -> dict[str, ConfusionMatrix]:
    """Confusion of the network alone (`network`), of it given the tags (`tags`), and of s̃ given them (`context`).

    The last is there where there is a bank.

    Args:
        model: put into evaluation mode.
        items: this rank's images; those without ground truth are passed over.
        protocol: see `mcic.inference.PROTOCOLS`.
        device: where the model is.
    """
    model.eval()
    num_classes = model.network.spec.num_classes
    names = ("network", "tags", "context") if model.memory is not None else ("network", "tags")
    confusion = {name: ConfusionMatrix(num_classes, device) for name in names}
    for batch in _by_size(items, device):

        def scores(images: Tensor, tags: Tensor = batch.tags) -> Tensor:
            prediction = model(images)
            if model.memory is None:
                return prediction.logits
            return torch.cat([prediction.logits, model.read(prediction, tags).logits], 1)

        maps = dense_protocol(scores, batch.images, model.network.stride, protocol)
        absent = ~with_background(batch.tags)[:, :, None, None]
        own = maps[:, :num_classes]
        confusion["network"].update(own.argmax(1), batch.truth)
        confusion["tags"].update(own.masked_fill(absent, -torch.inf).argmax(1), batch.truth)
        if "context" in confusion:
            given_tags = maps[:, num_classes:].masked_fill(absent, -torch.inf).argmax(1)
            confusion["context"].update(given_tags, batch.truth)
    for matrix in confusion.values():
        matrix.reduce()
    return confusion


@torch.no_grad()
def evaluate_masks(
    model: MCIC, objective: Objective, items: Iterable[EvalItem], *, device: torch.device
) -> dict[str, ConfusionMatrix]:
    """Confusion of those of `MASK_NAMES` that the configuration trains, on training images, given their tags."""
    model.eval()
    names = trained_masks(objective.method)
    confusion = {name: ConfusionMatrix(model.network.spec.num_classes, device) for name in names}
    for batch in _by_size(items, device):
        outputs = at_pixels(model, batch.images, batch.tags)
        for name, mask in mask_candidates(objective, outputs, batch.tags, batch.saliency, batch.images).items():
            if name in confusion:
                confusion[name].update(mask, batch.truth)
    for matrix in confusion.values():
        matrix.reduce()
    return confusion


def trained_masks(method: MethodConfig) -> tuple[str, ...]:
    """Those of `MASK_NAMES` that say something of a run: given masks leave the heatmaps untrained, and only tags have
    a context branch."""
    if method.supervision == "masks":
        return ("seg",)
    return ("cam", "seg") if method.supervision == "full" or method.context == "none" else MASK_NAMES


def summarize(
    network: dict[str, ConfusionMatrix], masks: dict[str, ConfusionMatrix], classes: tuple[str, ...]
) -> dict[str, Any]:
    """The quality entries of `summary.json`, IoUs in percent."""
    summary: dict[str, Any] = {"classes": ["background", *classes], "per_class": {}}
    if "network" in network:
        summary["val/miou"] = network["network"].miou()
        summary["per_class"]["val"] = network["network"].iou()
        summary["confusion"] = network["network"].counts.tolist()
    if "tags" in network:
        summary["val/miou_tags"] = network["tags"].miou()
    if "context" in network:
        summary["val/miou_context"] = network["context"].miou()
        summary["per_class"]["val_context"] = network["context"].iou()
    for name, matrix in masks.items():
        summary[f"train/mask_miou_{name}"] = matrix.miou()
        summary[f"train/mask_coverage_{name}"] = matrix.coverage()
        summary["per_class"][f"train_{name}"] = matrix.iou()
    return summary


def evaluate_run(
    run: Path, *, checkpoint: str = "newest", protocol: str | None = None, split: str = "val",
    device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a checkpoint of a run again; under torchrun every rank evaluates its share of the images.

    Args:
        run: the run folder.
        checkpoint: as for `restore_run`.
        protocol: see `mcic.inference.PROTOCOLS`; None: the run's own.
        split: `val`: the network and s̃; `train`: those of M, M', M'' and the control that the run trains.
        device: as `run.device`; None: the run's own.

    Returns:
        `checkpoint` (its name), `split` and `images` (with ground truth), then entries of `summary.json`, IoUs in
        percent.

    Raises:
        ValueError: no run folder, or one without that checkpoint.
    """
    restored = restore_run(run, checkpoint=checkpoint, device=device)
    distributed.initialize(restored.device)
    config, data, model, place = restored.config, restored.data, restored.model, restored.device
    count = config.eval.mask_images if split == "train" else None
    dataset = getattr(data, split).measured(count or None)
    saliency = restored.saliency if split == "train" else None  # only masks are made with it
    workers = default_workers(config.data.workers, dataset)
    items = eval_items(dataset, saliency, indices=share_of_rank(len(dataset)), workers=workers)
    network, masks = {}, {}
    with in_words(place, SMALLER_IMAGES):
        if split == "train":
            objective = Objective(config.method, backend=config.run.backend)
            masks = evaluate_masks(model, objective, items, device=place)
        else:
            network = evaluate_network(model, items, protocol=protocol or config.eval.protocol, device=place)
    distributed.finish()
    measured = {"checkpoint": restored.checkpoint.name, "split": split, "images": len(dataset)}
    return {**measured, **summarize(network, masks, data.train.classes)}


def share_of_rank(count: int) -> list[int]:
    """The places among `count` images that this rank evaluates."""
    return list(range(distributed.rank(), count, distributed.world_size()))


@dataclass(frozen=True, slots=True)
class _Stack:
    images: Tensor
    tags: Tensor
    saliency: Tensor | None
    truth: Tensor


def _by_size(items: Iterable[EvalItem], device: torch.device) -> Iterator[_Stack]:
    """Neighbouring images of one size, stacked; images without ground truth are left out."""
    waiting: list[EvalItem] = []
    for item in items:
        if item.mask is None:
            continue
        size = item.image.shape[-2:]
        full = (len(waiting) + 1) * size.numel() > BATCH_PIXELS
        if waiting and (full or waiting[0].image.shape[-2:] != size):
            yield _stack(waiting, device)
            waiting = []
        waiting.append(item)
    if waiting:
        yield _stack(waiting, device)


def _stack(items: list[EvalItem], device: torch.device) -> _Stack:
    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(item, name) for item in items]).to(device)

    saliency = None if items[0].saliency is None else stacked("saliency")
    images = stacked("image").contiguous(memory_format=torch.channels_last)
    return _Stack(images, stacked("tags"), saliency, stacked("mask"))
