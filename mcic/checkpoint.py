"""Checkpoints and the test-time network on disk: safetensors for numbers, JSON for the rest, never a pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mcic import __version__
from mcic.durable import new_folder, restore_folder, write_text, write_with
from mcic.model import MCIC, NetworkSpec, SegmentationNetwork
from mcic.optim import STATE_NAMES

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""bytes and SHA-256 of a checkpoint's other files"""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""as safetensors names them"""

NETWORK = "network"
"""stem of the two files of the test-time network"""


def save_checkpoint(
    folder: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int,
    random_states: list[Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write `folder/step-<step>`, then remove all but the newest `keep` checkpoints and the best one.

    The folder appears under its name when every byte is on the disk; `manifest.json` in it holds the SHA-256 of its
    files. What cannot be written leaves nothing behind, and the checkpoints that are there as they were.

    Args:
        folder: of all checkpoints, which is there.
        step: updates so far.
        model: weights, moving average and bank.
        optimizer: SGD or AdamW; its state is kept.
        state: further entries of `state.json`; the largest `score` in it marks the best checkpoint.
        keep: how many of the newest stay.
        random_states: of every rank's generator, uint8.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    target = folder / f"step-{step:08d}"
    written = _state(target)
    if _is_whole(target) and all(written.get(name) == state.get(name) for name in ("score", "epoch_closed")):
        return target  # of a run that was stopped there and continued: the same numbers
    try:
        with new_folder(target) as partial:
            write_tensors(model.state_dict(), partial / "model.safetensors")
            write_tensors(_state_of(optimizer), partial / "optimizer.safetensors")
            states = {f"rank_{rank}": numbers for rank, numbers in enumerate(random_states or [])}
            write_tensors(states, partial / "random.safetensors")
            (partial / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps({"files": files, "sha256": _digest_of(files)}))
    except OSError as error:
        newest = checkpoints(folder)[-1:]
        whole = f"the newest whole checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
        raise OSError(f"the checkpoint of step {step} could not be written to {folder}: {error}; {whole}") from error
    _prune(folder, keep)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; one whose replacement was cut off gets its name back."""
    for path in folder.glob(".step-*.old.partial"):
        restore_folder(folder / path.name.removeprefix(".").removesuffix(".old.partial"))
    return sorted(
        path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdecimal()
    )


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None where there is none at all.

    Raises:
        ValueError: there are checkpoints and none is whole; names what is wrong with the newest.
    """
    found, problems = checkpoints(folder), []
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            logger.warning("%s; going back to the checkpoint before it", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} is whole: {problems[0]}")
    return None


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        ValueError: names the file that is missing, truncated or changed.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is no checkpoint, or not a whole one: expected a folder with {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = manifest["files"]
        damaged = manifest["sha256"] != _digest_of(files)
    except (ValueError, TypeError, KeyError):
        damaged = True
    if damaged:
        raise ValueError(f"{path / MANIFEST} is damaged: it is not what was written")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} is truncated or damaged: {file.stat().st_size} bytes, not {entry['bytes']}")
        if _digest(file) != entry:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except ValueError:
        return False
    return True


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Put a checkpoint back into model and (where given) optimizer; returns its state, with `step`.

    Args:
        path: of the checkpoint.
        model, optimizer: as they were saved.
        classes: of the data; compared with those that `state` names, if it does.

    Raises:
        ValueError: not a checkpoint, a damaged one, or one of another model or other classes.
    """
    verify_checkpoint(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    known = state.get("classes", list(classes))
    if known != list(classes):
        raise ValueError(f"{path} is of the classes {', '.join(known)}; the data now have {', '.join(classes)}: "
                         "their names and their order must be the same")  # fmt: skip
    weights = path / "model.safetensors"
    _check_fit(_shapes(weights), model, source=path)
    model.load_state_dict(load_file(weights))
    if optimizer is not None:
        _load_state(optimizer, path / "optimizer.safetensors")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; empty where it cannot be read, which `load_checkpoint` says."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def used_ground_truth(path: Path) -> bool:
    """Whether masks that people drew had a part in the weights of a checkpoint or of an exported network."""
    for name in ("state.json", f"{NETWORK}.json"):
        if (path / name).is_file():
            return bool(json.loads((path / name).read_text(encoding="utf-8")).get("ground_truth_used"))
    return False


def load_random_state(path: Path, rank: int) -> Tensor | None:
    """The state of a rank's generator, uint8, or None where fewer ranks wrote the checkpoint."""
    return load_file(path / "random.safetensors").get(f"rank_{rank}")


def _prune(folder: Path, keep: int) -> None:
    found = checkpoints(folder)
    scores = {path: _state(path).get("score") for path in found}
    best = max((path for path in found if scores[path] is not None), key=scores.__getitem__, default=None)
    for path in found[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)  # one that stays is only too many
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while it wrote


def _state(path: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint; empty where it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest_of(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor in a file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the weights of a safetensors file by name; every name, shape and dtype must fit.

    Raises:
        ValueError: names what is missing, surplus or of another shape, before any tensor is read.
    """
    _check_fit(_shapes(path), module, source=path.parent)
    module.load_state_dict(load_file(path))


def _check_fit(
    shapes: dict[str, tuple[list[int], str]], module: nn.Module, *, source: Path, but: Collection[str] = ()
) -> None:
    own = {name: tensor for name, tensor in module.state_dict().items() if name not in but}
    missing, surplus = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    misfits = [
        f"{name} is {shapes[name][0]} {shapes[name][1]}, expected {list(own[name].shape)} {_DTYPES[own[name].dtype]}"
        for name in sorted(own.keys() & shapes.keys())
        if shapes[name] != (list(own[name].shape), _DTYPES[own[name].dtype])
    ]
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in
                (("missing", missing), ("surplus", surplus), ("misfitting", misfits)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}")


def load_initial(model: MCIC, path: Path, *, classes: Sequence[str]) -> None:
    """`run.init-from`: weights of a checkpoint (but its bank), or of an exported network, into a fresh model.

    Raises:
        ValueError: neither of them, damaged, or of another model or other classes than `classes`.
    """
    described = path / f"{NETWORK}.json" if (path / f"{NETWORK}.json").is_file() else path / "state.json"
    known = json.loads(described.read_text(encoding="utf-8")).get("classes") if described.is_file() else None
    if known is not None and list(known) != list(classes):
        raise ValueError(f"--run.init-from {path} is of the classes {', '.join(known)}; the data have "
                         f"{', '.join(classes)}: names and order must be the same")  # fmt: skip
    if (path / f"{NETWORK}.safetensors").is_file():
        load_weights(model.network, path / f"{NETWORK}.safetensors")
        if model.ema is not None:
            model.ema.load_state_dict(model.network.state_dict())
        return
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"--run.init-from {path}: expected a checkpoint folder, or one with {NETWORK}.safetensors")
    verify_checkpoint(path)
    own, weights = model.state_dict(), path / "model.safetensors"
    bank = {name for name in own if name.startswith("memory.")}
    # What only the method's training has, and this model has not: full supervision, the second stage.
    parts = tuple(f"{part}." for part in ("propagation", "ema") if not any(name.startswith(part) for name in own))
    shapes = {name: shape for name, shape in _shapes(weights).items() if not name.startswith(("memory.", *parts))}
    kept = set(bank)
    begins_average = model.ema is not None and not any(name.startswith("ema.") for name in shapes)
    if begins_average:
        kept |= {name for name in own if name.startswith("ema.")}
    _check_fit(shapes, model, source=path, but=kept)
    stored = load_file(weights)
    model.load_state_dict({name: own[name] if name in kept else stored[name] for name in own})
    if begins_average:
        model.ema.load_state_dict(model.network.state_dict())


def save_network(
    folder: Path, network: SegmentationNetwork, *, classes: Sequence[str], palette: Sequence[Sequence[int]],
    long_side: int = 0, ground_truth_used: bool = False,
) -> Path:  # fmt: skip
    """Write the test-time network: `network.safetensors` and `network.json` (how to build it, classes, palette).

    Args:
        folder: made if need be.
        network: backbone and segmentation head.
        classes: the L object classes; mask value i ≥ 1 is `classes[i - 1]`.
        palette: RGB 0…255 of the K mask values.
        long_side: pixels that the longer side of images had in training, and should have for prediction; 0: their own.
        ground_truth_used: masks that people drew trained the network or chose a threshold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = network.spec
    card = {
        "format": "mcic-network", "version": __version__, "backbone": spec.backbone, "output_stride": network.stride,
        "segmentation_head": spec.segmentation_head, "num_classes": spec.num_classes, "classes": list(classes),
        "palette": [list(map(int, color)) for color in palette], "long_side": long_side,
        "ground_truth_used": ground_truth_used,
        "input": "RGB / 255, minus the mean (0.485, 0.456, 0.406), divided by the standard deviation "
                 "(0.229, 0.224, 0.225) of ImageNet",
    }  # fmt: skip
    weights = folder / f"{NETWORK}.safetensors"
    write_with(weights, lambda path: write_tensors(network.state_dict(), path))
    write_text(folder / f"{NETWORK}.json", json.dumps(card, indent=1, ensure_ascii=False))
    return weights


def load_network(folder: Path) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """The network that `save_network` wrote, in evaluation mode, and its card.

    Raises:
        ValueError: not such a folder, or weights that do not fit the card.
    """
    description = folder / f"{NETWORK}.json"
    if not description.is_file():
        raise ValueError(f"{folder} holds no network: expected {NETWORK}.json and {NETWORK}.safetensors")
    card = json.loads(description.read_text(encoding="utf-8"))
    spec = NetworkSpec(card["backbone"], card["output_stride"], card["segmentation_head"], card["num_classes"])
    network = SegmentationNetwork(spec)
    load_weights(network, folder / f"{NETWORK}.safetensors")
    return network.eval(), card


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that an optimizer keeps of each parameter, as `<place of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    named = {f"{place}.{name}": value for place, entry in state.items() for name, value in entry.items()}
    return {name: value for name, value in named.items() if value is not None}


def _load_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = STATE_NAMES[type(optimizer)]
    for name, (shape, dtype) in _shapes(path).items():
        place, _, what = name.partition(".")
        expected = None
        if place.isdecimal() and int(place) < len(parameters) and what in kept:
            expected = [] if what == "step" else list(parameters[int(place)].shape)
        if shape != expected:
            raise ValueError(
                f"{path} does not fit this optimizer, {type(optimizer).__name__}: its {name} is {shape} {dtype}"
            )
    for name, value in load_file(path).items():
        place, _, what = name.partition(".")
        parameter = parameters[int(place)]
        # In the parameter's order of dimensions, which the fused update takes for granted.
        like = torch.zeros((), device=parameter.device) if what == "step" else torch.empty_like(parameter)
        optimizer.state[parameter][what] = like.copy_(value)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
