"""Choosing how much of one's own images the CAM mask gives to objects, by α or T_a: without masks, or with a few.

Without masks two things are measured and multiplied: the mutual information between a mask's labels and the colours of
its image, which is large where object and surroundings are told apart, and the contrast of the image along the mask's
borders, which is large where they lie on edges. Each alone prefers masks that are too large or too small. On three
trained runs, with and without saliency, the value chosen so was within 0.6 points of mIoU of the best (docs/photos.md).
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcic.config import Config, MethodConfig
from mcic.data import EvalItem, default_workers, eval_items
from mcic.data.base import IGNORE
from mcic.data.images import read_mask
from mcic.data.transforms import NEAREST, fitted
from mcic.durable import write_text
from mcic.evaluate import at_pixels
from mcic.metrics import ConfusionMatrix
from mcic.pseudo import cam_mask
from mcic.restore import RestoredRun, restore_run

FILE = "calibration.json"
POWERS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""α of the background row that are compared"""
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""T_a that are compared where the background row is the authors', which has no α"""
NUM_IMAGES = 200
"""training images that are looked at"""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was compared and chosen.

    Attributes:
        field: of `MethodConfig`, `background_power` or `cam_threshold`.
        current: the run's value.
        chosen: the value with the best score.
        scores: value → score: mIoU in percent of the annotated images, else mean `color_information` times mean
            `edge_contrast`.
        ground_truth_used: whether annotated masks made the choice, or had a part in the run.
        num_images: that were looked at.
    """

    field: str
    current: float
    chosen: float
    scores: dict[float, float]
    ground_truth_used: bool
    num_images: int


def color_information(labels: np.ndarray, pixels: np.ndarray) -> float:
    """Mutual information between a mask and the colours of its image, in nats.

    Args:
        labels: uint8 [H, W]; 255 (ignore) counts as background.
        pixels: uint8 [H, W, 3]; each channel is quantised to 8 levels.
    """
    bins = (pixels // 32).astype(np.int64) @ np.array([64, 8, 1])
    labels = np.where(labels == IGNORE, 0, labels).astype(np.int64)
    joint = np.bincount((labels * 512 + bins).ravel(), minlength=256 * 512).reshape(256, 512) / bins.size
    return _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint)


def edge_contrast(labels: np.ndarray, pixels: np.ndarray) -> float:
    """How much neighbouring pixels of different labels differ in colour, over how much neighbours differ at all.

    Args:
        labels: uint8 [H, W]; 255 (ignore) counts as background.
        pixels: uint8 [H, W, 3].

    Returns:
        0 or more; 1 for borders that lie anywhere, 0 without a border or in an image of one colour.
    """
    labels, colors = np.where(labels == IGNORE, 0, labels), pixels.astype(np.float64)
    differences = [np.abs(np.diff(colors, axis=axis)).sum(2).ravel() for axis in (0, 1)]
    borders = [(np.diff(labels.astype(int), axis=axis) != 0).ravel() for axis in (0, 1)]
    difference, border = np.concatenate(differences), np.concatenate(borders)
    if not border.any() or not difference.any():
        return 0.0
    return float(difference[border].mean() / difference.mean())


def calibrate(folder: Path, *, masks: Path | None = None, device: str | None = None) -> Calibration:
    """Compare values of α, or of T_a, on the training images of a run, and keep the best one.

    Args:
        folder: of a run; `calibration.json` is written there.
        masks: folder of index PNGs named by image id, of as many training images as there are; None: no ground truth.
        device: as `run.device`; None: the run's own.

    Raises:
        ValueError: no run, no mask that fits a training image, or masks that are not index masks of these classes.
    """
    run = restore_run(folder, device=device)
    method = run.config.method
    if method.supervision == "masks":
        raise ValueError(f"{folder} was trained on masks and has no heatmaps: calibrate the run that it came from")
    field = calibrated_field(run.config)
    values = THRESHOLDS if field == "cam_threshold" else POWERS
    annotated = None if masks is None else _annotated(masks, run.data.train.ids)
    count = len(run.data.train)
    evenly = np.linspace(0, count - 1, min(NUM_IMAGES, count)).round().astype(int)
    indices = evenly if annotated is None else list(annotated)
    confusion = {value: ConfusionMatrix(len(run.data.train.classes) + 1) for value in values}
    measured: dict[float, list[tuple[float, float]]] = {value: [] for value in values}
    for item, labels in _masks(run, indices, field, values):
        for value, mask in labels.items():
            if annotated is None:
                measured[value].append((color_information(mask, item.pixels), edge_contrast(mask, item.pixels)))
            else:
                truth = _truth(annotated[item.index], item, len(run.data.train.classes))
                confusion[value].update(torch.from_numpy(mask), torch.from_numpy(truth))
    if annotated is None:
        scores = {value: float(np.prod(np.mean(measured[value], axis=0))) for value in values}
    else:
        scores = {value: confusion[value].miou() or 0.0 for value in values}
    chosen = max(scores, key=scores.__getitem__)
    used = annotated is not None or run.ground_truth_used
    result = Calibration(field, getattr(method, field), chosen, scores, used, len(indices))
    write_text(folder / FILE, json.dumps(dataclasses.asdict(result), indent=1))
    return result


def calibrated_field(config: Config) -> str:
    """What of `MethodConfig` decides how much of an image is object: T_a where the published background row reads a
    saliency map, else α."""
    by_saliency = config.method.cam_background == "authors" and config.data.saliency != "none"
    return "cam_threshold" if by_saliency else "background_power"


def apply_calibration(config: Config, *, stored: Config | None = None) -> Config:
    """The configuration with what its `data.calibration` chose, if it names one.

    Args:
        config: resolved.
        stored: of the run that goes on; with the same calibration its value counts, whatever the file says now.

    Raises:
        ValueError: the file is not there, not what `calibrate` wrote, or of a setting that decides nothing here.
    """
    if config.data.calibration is None:
        return config
    method, expected = config.method, calibrated_field(config)
    if stored is not None and stored.data.calibration == config.data.calibration:
        return dataclasses.replace(config, method=_with(method, expected, getattr(stored.method, expected)))
    found = read_calibration(Path(config.data.calibration))
    if found["field"] != expected:
        chosen, wanted = (f"--method.{name.replace('_', '-')}" for name in (found["field"], expected))
        raise ValueError(
            f"--data.calibration {config.data.calibration} chose {chosen}, and with --method.cam-background "
            f"{method.cam_background} it is {wanted} that decides: calibrate a run with these rules"
        )
    return dataclasses.replace(config, method=_with(method, found["field"], found["chosen"]))


def read_calibration(path: Path) -> dict[str, Any]:
    """The entries of `Calibration` as they were stored; `path` is the file or a run that has it."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--data.calibration {path} is not there: mcic calibrate RUN writes it")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["field"] in ("background_power", "cam_threshold") and isinstance(stored["chosen"], float):
            return stored
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--data.calibration {path} is not a file that mcic calibrate wrote")


def _with(method: MethodConfig, field: str, value: float) -> MethodConfig:
    return dataclasses.replace(method, **{field: value})


@torch.no_grad()
def _masks(
    run: RestoredRun, indices: Any, field: str, values: tuple[float, ...]
) -> Iterator[tuple[EvalItem, dict[float, np.ndarray]]]:
    """Every image with its CAM mask, uint8 [H, W], for every value of the field, as it is before any refinement.

    α is compared where every pixel has a label, for it decides which one; T_a decides which labels to trust.
    """
    fixed = run.config.method
    if field == "background_power":
        fixed = dataclasses.replace(fixed, cam_threshold=0.0)
    train = run.data.train
    for item in eval_items(
        train, run.saliency, indices=indices, workers=default_workers(run.config.data.workers, train)
    ):
        tags = item.tags[None].to(run.device)
        heatmap = at_pixels(run.model, item.image[None].to(run.device), tags).prediction.heatmap
        saliency = None if item.saliency is None else item.saliency[None].to(run.device)
        found = {}
        for value in values:
            method = _with(fixed, field, value)
            mask = cam_mask(
                heatmap, tags, saliency, threshold=method.cam_threshold, rules=method.cam_background,
                background_power=method.background_power,
            )  # fmt: skip
            found[value] = mask[0].cpu().numpy()
        yield item, found


def _annotated(folder: Path, ids: list[str]) -> dict[int, Path]:
    """Place of a training image → its mask's file."""
    if not folder.is_dir():
        raise ValueError(f"--masks {folder} is no folder: expected index PNGs named by image id")
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".png")
    files = {unicodedata.normalize("NFC", path.stem): path for path in found}
    found = {index: files[name] for index, name in enumerate(ids) if name in files}
    if not found:
        raise ValueError(f"--masks {folder} has no mask of a training image: expected names like {ids[0]}.png")
    return found


def _truth(path: Path, item: EvalItem, num_classes: int) -> np.ndarray:
    """The annotated mask at the size at which the image was read."""
    mask, (height, width) = read_mask(path), item.full_size
    if mask.shape != (height, width):
        raise ValueError(f"{path} is {mask.shape[1]}×{mask.shape[0]}, its image {width}×{height}")
    largest = int(mask.max(where=mask != IGNORE, initial=0))
    if largest > num_classes:
        raise ValueError(f"{path} has the value {largest}: expected 0…{num_classes} or {IGNORE} (ignore)")
    return fitted(mask, max(item.pixels.shape[:2]), NEAREST)


def _entropy(shares: np.ndarray) -> float:
    """In nats."""
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
