"""Pictures of what a model does with an image: heatmap, masks, prediction, attention."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcic.data import Dataset, EvalItem
from mcic.evaluate import PixelOutputs, at_pixels, mask_candidates
from mcic.inference import to_pixels
from mcic.metrics import ConfusionMatrix
from mcic.model import MCIC
from mcic.objective import Objective
from mcic.preview import Example, colorize, contact_sheet, heat, overlay, write_examples
from mcic.pseudo import normalized_heatmap, with_background

MASK_TITLES = {"cam": "CAM mask", "seg": "control", "context": "context mask", "merged": "merged mask"}


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
    folder: Path, model: MCIC, objective: Objective, items: Iterable[EvalItem], dataset: Dataset, *,
    device: torch.device,
) -> None:  # fmt: skip
    """Write the examples of a run's report below `folder`."""
    write_examples(folder, [example_of(model, objective, item, dataset, device) for item in items])


@torch.no_grad()
def example_of(model: MCIC, objective: Objective, item: EvalItem, dataset: Dataset, device: torch.device) -> Example:
    """One image's panels, with the model in evaluation mode; it is left as it was."""
    was_training = model.training
    model.eval()
    images, tags = item.image[None].to(device), item.tags[None].to(device)
    saliency = None if item.saliency is None else item.saliency[None].to(device)
    outputs = at_pixels(model, images, tags)
    masks = mask_candidates(objective, outputs, tags, saliency)
    masks = {MASK_TITLES[name]: mask[0].cpu() for name, mask in masks.items() if name != "seg" or len(masks) < 4}
    masks["prediction"] = outputs.prediction.logits[0].argmax(0).cpu()
    panels = {"heatmap": heat(item.pixels, _heatmap(outputs, tags))}
    panels |= {name: overlay(item.pixels, mask.numpy(), dataset.palette) for name, mask in masks.items()}
    if item.mask is not None:
        panels["ground truth"] = overlay(item.pixels, item.mask.numpy(), dataset.palette)
    if model.memory is not None:
        panels["attention"] = _attention(model, outputs, images, tags, dataset.palette)
    model.train(was_training)
    return Example(
        id=dataset.ids[item.index],
        tags=tuple(name for name, there in zip(dataset.classes, item.tags.tolist(), strict=True) if there),
        pixels=item.pixels,
        panels=panels,
        iou={name: _miou(mask, item.mask, len(dataset.classes) + 1) for name, mask in masks.items()},
    )


def _heatmap(outputs: PixelOutputs, tags: Tensor) -> np.ndarray:
    return normalized_heatmap(outputs.prediction.heatmap, tags)[0].amax(0).cpu().numpy()


def _attention(model: MCIC, outputs: PixelOutputs, images: Tensor, tags: Tensor, palette: np.ndarray) -> np.ndarray:
    """Each pixel in the colour of the class it reads most, brighter where it reads little else."""
    stride, size = model.network.stride, tuple(images.shape[-2:])
    features = outputs.prediction.features
    weights = model.propagation.weights(
        features, model.memory.entries, model.memory.counts, with_background(tags)
    )  # [1, N, K, S]
    by_class = weights.sum(-1).transpose(1, 2).unflatten(2, features.shape[-2:])
    share, label = to_pixels(by_class, stride, size)[0].max(0)
    colors = colorize(label.cpu().numpy().astype(np.uint8), np.maximum(palette, 24))
    return np.rint(colors * share.cpu().numpy()[..., None]).astype(np.uint8)


def _miou(mask: Tensor, truth: Tensor | None, num_classes: int) -> float | None:
    if truth is None:
        return None
    confusion = ConfusionMatrix(num_classes)
    confusion.update(mask, truth)
    return confusion.miou()
