"""Settings that a configuration leaves to the data and the machine: image size, crop, batch, epochs, precision."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from mcic import distributed
from mcic.build import available_memory, build_model
from mcic.config import Config
from mcic.data import Dataset
from mcic.model import MCIC

logger = logging.getLogger(__name__)

SETTLED = ("data.long_side", "train.size", "train.precision", "train.batch_size", "train.epochs")
"""what `settle` fills, in its order"""
SIDES = (336, 512)
"""least and most pixels that the longer side of photographs is brought to: the size for which backbones are made"""
LARGEST_CROP = 321
"""the paper's"""
LARGEST_BATCH = 16
"""the paper's"""
CPU_BATCH = 8
"""on a CPU a larger batch takes as long per image, and leaves fewer updates"""


def settle(config: Config, train: Dataset, device: torch.device) -> Config:
    """Fill what is unset from the training images and the machine, and say what was chosen.

    - `data.long_side`: the median of the images' longer sides, at least 336 and at most 512: all images get one size.
    - `train.size`: the crop nearest to the median of the shorter sides, as they are read, that features tile; at most
      321.
    - `train.precision`: bf16 on a GPU that computes in it, else fp32.
    - `train.batch_size`: 16 on a GPU and 8 on a CPU, halved until the activations of a training step, measured on one
      image, take at most half of the free memory and the images fill at least four batches.
    - `train.epochs`: 12 · √(300 / images), from 4 to 60: the more images, the fewer passes and the more updates.

    Args:
        config: resolved but for these fields.
        train: the training images.
        device: that trains.
    """
    model = _skeleton(config, len(train.classes) + 1)
    chosen: dict[str, Any] = {}

    def choose(name: str, value: Callable[[], Any]) -> None:
        nonlocal config
        group, field = name.split(".")
        if getattr(getattr(config, group), field) is None:
            chosen[name] = value()
            config = _replaced(config, group, field, chosen[name])

    choose("data.long_side", lambda: min(max(SIDES[0], _median(train, max)), SIDES[1]))
    choose("train.size", lambda: _crop(config, model.network.stride, train))
    choose("train.precision", lambda: "bf16" if _computes_in_bf16(device) else "fp32")
    choose("train.batch_size", lambda: _batch_size(config, model, len(train), device))
    choose("train.epochs", lambda: min(60, max(4, round(12 * math.sqrt(300 / max(1, len(train)))))))
    if chosen:
        listed = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
        logger.info("Chosen from %d training images and this machine: %s", len(train), listed)
    return config


def fill_unset(config: Config, stored: Config) -> Config:
    """What `settle` would choose, taken from a stored configuration."""
    for name in SETTLED:
        group, field = name.split(".")
        if getattr(getattr(config, group), field) is None:
            config = _replaced(config, group, field, getattr(getattr(stored, group), field))
    return config


def step_memory(model: MCIC, size: int, *, averages: int = 1) -> tuple[int, int]:
    """Bytes that a training step needs: (for each image of the batch, whatever the batch).

    The first are the tensors in fp32 that autograd keeps of the network's forward pass, the second weights, gradients
    and the optimizer's averages. Masks, context branch and the convolutions' scratch memory come on top.

    Args:
        model: on the device `meta`: nothing is computed.
        size: side of the crop, pixels.
        averages: that the optimizer keeps of each gradient: `sgd` one, `adamw` two.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    images = 2  # batch norm must see more than one value per channel
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = model(torch.zeros(images, 3, size, size, device="meta"))
    del prediction
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    activations = sum(nbytes for storage, nbytes in kept.items() if storage not in own)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return activations // images, (2 + averages) * weights + sum(buffer.nbytes for buffer in model.buffers())


def _skeleton(config: Config, num_classes: int) -> MCIC:
    """The model without numbers."""
    model_config = dataclasses.replace(config.model, weights="none")
    with torch.device("meta"):
        return build_model(model_config, config.method, num_classes=num_classes, backend="reference").train()


def _batch_size(config: Config, model: MCIC, num_images: int, device: torch.device) -> int:
    """Rank 0's answer: free memory may differ between machines."""
    averages = 2 if config.train.optimizer == "adamw" else 1
    per_image, fixed = step_memory(model, config.train.size, averages=averages)
    if config.train.precision != "fp32":
        per_image //= 2
    room = available_memory(device) // 2 - fixed
    parts = config.train.accumulate * distributed.world_size()  # of the batch, each in memory on its own
    batch = LARGEST_BATCH if device.type == "cuda" else CPU_BATCH
    while batch > 1 and (batch * per_image > parts * room or 4 * batch > num_images):
        batch //= 2
    return int(distributed.from_first(str(max(1, batch // parts) * parts)))


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _crop(config: Config, stride: int, train: Dataset) -> int:
    """A multiple of the output stride plus 1."""
    shorter = _median(train, min)
    if config.data.long_side:
        shorter *= config.data.long_side / _median(train, max)
    return max(1, round((min(shorter, LARGEST_CROP) - 1) / stride)) * stride + 1


def _median(train: Dataset, side: Any) -> int:
    """The middle one of the images' longer (`max`) or shorter (`min`) sides, from at most 200 of them."""
    step = max(1, len(train) // 200)
    sides = sorted(side(train.size(index)) for index in range(0, len(train), step))
    return sides[len(sides) // 2]


def _replaced(config: Config, group: str, field: str, value: Any) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})
