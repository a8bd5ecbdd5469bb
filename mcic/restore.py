"""A run read back from its folder: configuration, data and the model of a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from mcic.build import build_model, choose_device
from mcic.checkpoint import checkpoints, load_checkpoint, newest_good, used_ground_truth, verify_checkpoint
from mcic.config import Config
from mcic.config_io import load_config
from mcic.data import build_data, build_saliency
from mcic.data.base import Splits
from mcic.data.saliency import SaliencySource
from mcic.model import MCIC
from mcic.runfolder import finite, read_lines


@dataclass(frozen=True, slots=True)
class RestoredRun:
    """What a run trained, ready to be used again.

    Attributes:
        folder: of the run.
        checkpoint: the one that was read.
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


def restore_run(folder: Path, *, checkpoint: str = "newest", device: str | None = None) -> RestoredRun:
    """Read a run back.

    Args:
        folder: of the run.
        checkpoint: newest: the newest whole one | best: the best on val, of those that were evaluated | the name of one
            in its `checkpoints`.
        device: as `run.device`; None: the run's own.

    Raises:
        ValueError: no run folder, one without that checkpoint or with a damaged one, or data that are gone or have
            other classes now.
    """
    config = load_config(folder / "config.yaml")
    path = _chosen(folder, checkpoint)
    place = choose_device(device or config.run.device)
    try:
        data = build_data(config.data)
    except ValueError as error:
        hint = f"where data moved, edit {folder / 'config.yaml'}; a relative path counts from the current folder"
        raise ValueError(f"{error} ({hint})") from error
    saliency = build_saliency(config.data.saliency, cache=config.data.cache)
    model_config = dataclasses.replace(config.model, weights="none")  # the checkpoint has them
    num_classes = len(data.train.classes) + 1
    model = build_model(model_config, config.method, num_classes=num_classes, backend=config.run.backend)
    load_checkpoint(path, model=model, classes=data.train.classes)
    model.to(place, memory_format=torch.channels_last).eval()
    return RestoredRun(folder, path, config, data, saliency, model, place, used_ground_truth(path))


def _chosen(run: Path, name: str) -> Path:
    found = {path.name: path for path in checkpoints(run / "checkpoints")}
    if not found:
        raise ValueError(f"{run} holds no checkpoint yet: expected checkpoints/step-…")
    if name == "newest":
        return newest_good(run / "checkpoints")
    if name == "best":
        names = {int(name.removeprefix("step-")): name for name in found}
        lines = read_lines(run / "evaluations.jsonl")
        lines = [line for line in lines if line.get("step") in names and finite(line, "val/miou") is not None]
        if not lines:
            raise ValueError(f"no checkpoint of {run} was evaluated on val, so none is the best: choose another")
        name = names[max(lines, key=lambda line: line["val/miou"])["step"]]
    if name not in found:
        raise ValueError(f"--checkpoint must be newest, best or one of {', '.join(found)}, got {name!r}")
    verify_checkpoint(found[name])
    return found[name]
