"""A run read back from its folder: configuration, data and the model of its newest checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from mcic.build import build_model, choose_device
from mcic.checkpoint import load_checkpoint, newest_good, used_ground_truth
from mcic.config import Config
from mcic.config_io import load_config
from mcic.data import build_data, build_saliency
from mcic.data.base import Splits
from mcic.data.saliency import SaliencySource
from mcic.model import MCIC


@dataclass(frozen=True, slots=True)
class RestoredRun:
    """What a run trained, ready to be used again.

    Attributes:
        folder: of the run.
        checkpoint: the newest whole one.
        config: as the run resolved it.
        data: its data set.
        saliency: its saliency source, or None.
        model: the checkpoint's, bank included, in evaluation mode on `device`.
        device: where the model is.
        ground_truth_used: masks that people drew trained the run or chose a threshold of it.
    """

    folder: Path
    checkpoint: Path
    config: Config
    data: Splits
    saliency: SaliencySource | None
    model: MCIC
    device: torch.device
    ground_truth_used: bool


def restore_run(folder: Path, *, device: str | None = None) -> RestoredRun:
    """Read a run back.

    Args:
        folder: of the run.
        device: as `run.device`; None: the run's own.

    Raises:
        ValueError: no run folder, one without a whole checkpoint, or data that are gone or have other classes now.
    """
    config = load_config(folder / "config.yaml")
    path = newest_good(folder / "checkpoints")
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint yet: expected checkpoints/step-…")
    place = choose_device(device or config.run.device)
    data = build_data(config.data)
    saliency = build_saliency(config.data.saliency, cache=config.data.cache)
    model_config = dataclasses.replace(config.model, weights="none")  # the checkpoint has them
    num_classes = len(data.train.classes) + 1
    model = build_model(model_config, config.method, num_classes=num_classes, backend=config.run.backend)
    load_checkpoint(path, model=model, classes=data.train.classes)
    model.to(place, memory_format=torch.channels_last).eval()
    return RestoredRun(folder, path, config, data, saliency, model, place, used_ground_truth(path))
