"""Checkpoints and the test-time network on disk: safetensors for numbers, JSON for the rest, never a pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mcic import __version__
from mcic.model import MCIC, NetworkSpec, SegmentationNetwork

NETWORK = "network"
"""stem of the two files of the test-time network"""


def save_checkpoint(
    folder: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>`, then remove all but the newest `keep` checkpoints.

    The folder appears under its name only when it is complete.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), partial / "model.safetensors")
    save_file(_momentum(optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint back into model and (where given) optimizer; returns its state, with `step`.

    Raises:
        ValueError: not a checkpoint, or one of another model.
    """
    state_file = path / "state.json"
    if not state_file.is_file():
        raise ValueError(f"{path} is no checkpoint: expected a folder with model.safetensors and state.json")
    load_weights(model, load_file(path / "model.safetensors"), source=path)
    if optimizer is not None:
        _load_momentum(optimizer, load_file(path / "optimizer.safetensors"))
    return json.loads(state_file.read_text())


def load_weights(module: nn.Module, weights: dict[str, Tensor], *, source: Path) -> None:
    """Copy weights by name; every name and shape must fit.

    Raises:
        ValueError: names what is missing, surplus or of another shape.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    misfits = [
        f"{name} is {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in
                (("missing", missing), ("surplus", surplus), ("misfitting", misfits)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict(weights)


def load_initial(model: MCIC, path: Path) -> None:
    """`run.init-from`: weights of a checkpoint (but its bank), or of an exported network, into a fresh model."""
    if (path / f"{NETWORK}.safetensors").is_file():
        load_weights(model.network, load_file(path / f"{NETWORK}.safetensors"), source=path)
        if model.ema is not None:
            model.ema.load_state_dict(model.network.state_dict())
        return
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"--run.init-from {path}: expected a checkpoint folder, or one with {NETWORK}.safetensors")
    own = model.state_dict()
    weights = load_file(path / "model.safetensors")
    kept = {name: own[name] for name in own if name.startswith("memory.")}
    load_weights(model, {**{n: w for n, w in weights.items() if not n.startswith("memory.")}, **kept}, source=path)


def save_network(
    folder: Path, network: SegmentationNetwork, *, classes: Sequence[str], palette: Sequence[Sequence[int]],
    long_side: int = 0,
) -> Path:  # fmt: skip
    """Write the test-time network: `network.safetensors` and `network.json` (how to build it, classes, palette).

    Args:
        folder: made if need be.
        network: backbone and segmentation head.
        classes: the L object classes; mask value i ≥ 1 is `classes[i - 1]`.
        palette: RGB 0…255 of the K mask values.
        long_side: larger images were reduced to it in training, and should be for prediction; 0: none were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = network.spec
    card = {
        "format": "mcic-network", "version": __version__, "backbone": spec.backbone, "output_stride": network.stride,
        "segmentation_head": spec.segmentation_head, "num_classes": spec.num_classes, "classes": list(classes),
        "palette": [list(map(int, color)) for color in palette], "long_side": long_side,
        "input": "RGB / 255, ImageNet mean (0.485, 0.456, 0.406) taken out, over deviation (0.229, 0.224, 0.225)",
    }  # fmt: skip
    weights, description = folder / f"{NETWORK}.safetensors", folder / f"{NETWORK}.json"
    temporary = folder / f".{NETWORK}.partial"
    save_file(_contiguous(network.state_dict()), temporary)
    os.replace(temporary, weights)
    temporary.write_text(json.dumps(card, indent=1, ensure_ascii=False))
    os.replace(temporary, description)
    return weights


def load_network(folder: Path) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """The network that `save_network` wrote, in evaluation mode, and its card.

    Raises:
        ValueError: not such a folder, or weights that do not fit the card.
    """
    description = folder / f"{NETWORK}.json"
    if not description.is_file():
        raise ValueError(f"{folder} holds no network: expected {NETWORK}.json and {NETWORK}.safetensors")
    card = json.loads(description.read_text())
    spec = NetworkSpec(card["backbone"], card["output_stride"], card["segmentation_head"], card["num_classes"])
    network = SegmentationNetwork(spec)
    load_weights(network, load_file(folder / f"{NETWORK}.safetensors"), source=folder)
    return network.eval(), card


def _momentum(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The momentum buffers by the place of their parameter."""
    state = optimizer.state_dict()["state"]
    buffers = {str(place): entry.get("momentum_buffer") for place, entry in state.items()}
    return _contiguous({place: buffer for place, buffer in buffers.items() if buffer is not None})


def _load_momentum(optimizer: torch.optim.Optimizer, buffers: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    state["state"] = {int(place): {"momentum_buffer": buffer} for place, buffer in buffers.items()}
    optimizer.load_state_dict(state)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
