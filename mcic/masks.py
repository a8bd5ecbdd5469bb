"""Masks of the images that a run has tags for: soft, refined along image edges, written as files.

The network's scores at several scales, mirrored too, are averaged and restricted to the classes that an image is
tagged with and background; a refinement follows, and pixels that stay unsure are ignored. A folder of masks holds

    labels/<id>.png       palette PNG, uint8: 0 background, i ≥ 1 class i, 255 unsure
    confidence/<id>.png   grey PNG, round(255 · probability of the winning class), also where the label is 255
    settings.json         what the masks were made with; an interrupted command continues only with the same
    masks.json            what is in the folder; written last, so that its presence says that the masks are complete
    coco.json             on request, see `mcic.coco_json`
    overlays/<id>.jpg     on request: the image with its mask, to look at

Sizes are those of the upright images, also where a run read them at another. No ground truth is read for any choice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcic import __version__, distributed
from mcic.build import in_words
from mcic.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from mcic.coco_json import coco_instances
from mcic.config import MethodConfig
from mcic.data import Dataset, EvalItem, default_workers, eval_items
from mcic.data.images import read_mask
from mcic.data.palette import voc_palette
from mcic.evaluate import share_of_rank
from mcic.inference import at_scale
from mcic.maskfiles import COCO, FORMAT, MANIFEST, OVERLAYS, claim_folder, is_written, write_json
from mcic.metrics import ConfusionMatrix
from mcic.model import MCIC
from mcic.pseudo import IGNORE, cam_scores, with_background
from mcic.refine import Method, refine
from mcic.restore import RestoredRun, restore_run
from mcic.segmentation import Segmentation, save_image, save_mask
from mcic.tiles import resized

logger = logging.getLogger(__name__)

Source = Literal["merged", "context", "network", "cam"]

UNSURE: dict[str, float] = {"none": 0.6, "pamr": 0.6, "crf": 0.9}
"""what is unsure after each refinement. A CRF is surer than it is right: on photographs of 224 pixels that were tried
(docs/photos.md), half of the pixels below 0.9 were wrong, of the others 3 to 5 in a hundred."""

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSettings:
    """What decides over the masks of a run."""

    split: Literal["train", "val"] = "train"
    """whose masks"""
    source: Source | None = None
    """see `soft_masks`; None: merged where the run has a bank, else network"""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """sizes at which the network looks at an image, 0.1…10 times that at which the run read it"""
    flip: bool = True
    """also at its mirror image"""
    refine: Method = "crf"
    """see `mcic.refine`"""
    unsure: float | None = None
    """pixels whose winning class is less probable are ignored, 0…1; None: as `UNSURE` says for the refinement"""

    def __post_init__(self) -> None:
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise ValueError(f"--scales must be one or more numbers between 0.1 and 10, got {list(self.scales)}")
        if self.unsure is not None and not 0 <= self.unsure <= 1:
            raise ValueError(f"--unsure must be between 0 and 1, got {self.unsure}")


def write_masks(
    run: Path, settings: MaskSettings, *, checkpoint: str = "newest", out: Path | None = None, coco: bool = False,
    overlays: bool = False, overwrite: bool = False, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the masks of a run's images; under torchrun every rank makes its share.

    Args:
        run: the run folder.
        settings: what decides over the masks.
        checkpoint: as for `restore_run`.
        out: folder for the masks, made if need be; None: `masks` in the run folder.
        coco: also write `coco.json`.
        overlays: also draw each mask over its image.
        overwrite: make masks that are there anew; else finished ones are kept.
        device: as `run.device`; None: the run's own.

    Returns:
        The content of `masks.json`. Its `measured` holds `mask_miou` (percent; None without ground truth) and
        `labelled` (percent of the pixels that are not ignored), for information.

    Raises:
        ValueError: no run with that checkpoint, a source that it does not have, images that cannot be read, a folder
            with other files, or with masks of other settings, weights or data and not `overwrite`.
    """
    restored = restore_run(run, checkpoint=checkpoint, device=device)
    distributed.initialize(restored.device)
    settings = _complete(settings, restored)
    dataset = getattr(restored.data, settings.split)
    folder = run / "masks" if out is None else out
    record = {**_made_from(restored.checkpoint, dataset), **asdict(settings)}
    claim_folder(folder, record, overwrite=overwrite)
    missing = [index for index, image_id in enumerate(dataset.ids) if not is_written(folder, image_id)]
    distributed.barrier()  # every rank has counted before the first one writes
    if missing and distributed.rank() == 0:
        for old in (MANIFEST, COCO):
            (folder / old).unlink(missing_ok=True)
        kept = len(dataset) - len(missing)
        logger.info("%d masks to make%s → %s", len(missing), f", {kept} are there" if kept else "", folder)
    _make(restored, settings, folder, [missing[place] for place in share_of_rank(len(missing))])
    measured = _measure(dataset, folder, restored.device)
    if overlays:
        _draw(dataset, folder)
    manifest = {
        "format": FORMAT, "version": __version__, "run": str(run), "settings": record, "count": len(dataset),
        "classes": ["background", *dataset.classes], "palette": dataset.palette.tolist(),
        "ground_truth_used": restored.ground_truth_used, "measured": measured,
    }  # fmt: skip
    if distributed.rank() == 0:
        if coco:
            root = restored.config.data.root
            content = coco_instances(dataset, folder / "labels", root=None if root is None else Path(root))
            write_json(folder / COCO, content)
        write_json(folder / MANIFEST, manifest)
    distributed.barrier()
    distributed.finish()
    return manifest


@torch.no_grad()
def soft_masks(
    model: MCIC, method: MethodConfig, images: Tensor, tags: Tensor, saliency: Tensor | None, *, source: Source,
    scales: Sequence[float] = (1.0,), flip: bool = False,
) -> Tensor:  # fmt: skip
    """Probabilities of background and of an image's own classes, before refinement.

    Scores (s, s̃ or the heatmap) are averaged over scales and mirror images before anything is made of them.

    Args:
        model: in evaluation mode.
        method: resolved; the rules of the CAM mask's scores.
        images: f32 [B, 3, H, W], normalised.
        tags: bool [B, L].
        saliency: f32 [B, H, W] in 0…1 or None; read by `cam` and `merged` only.
        source: `network`: softmax of s. `context`: of s̃, read from the bank. `cam`: the rows that the CAM mask M
            compares, scaled to sum 1. `merged`: the mean of `cam` and `context`, sure where they agree as M'' is.
        scales: sizes of the image at which the network looks at it.
        flip: also at its mirror image.

    Returns:
        f32 [B, K, H, W], sums to 1 over K, 0 for classes that an image has no tag of.
    """
    own = with_background(tags)[:, :, None, None]
    num_classes = own.shape[1]

    def scores(batch: Tensor) -> Tensor:
        prediction = model(batch)
        logits = prediction.logits if source in ("network", "cam") else model.read(prediction, tags).logits
        return torch.cat([logits, prediction.heatmap], 1)

    maps = torch.stack([at_scale(scores, images, model.network.stride, scale, flip) for scale in scales]).mean(0)
    logits, heatmap = maps[:, :num_classes], maps[:, num_classes:]
    softmax = logits.masked_fill(~own, -torch.inf).softmax(1)
    if source in ("network", "context"):
        return softmax
    rows = cam_scores(
        heatmap, tags, saliency, threshold=method.cam_threshold, rules=method.cam_background,
        background_power=method.background_power,
    )  # fmt: skip
    rows = (rows + 1e-6) * own  # a salient pixel without any heat has no row above 0
    cam = rows / rows.sum(1, keepdim=True)
    return cam if source == "cam" else (cam + softmax) / 2


def decide(probabilities: Tensor, *, unsure: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K, H, W] → labels uint8 [B, H, W], 255 where the best one is below `unsure`, and confidence
    uint8 [B, H, W], 255 times that best one. A tie goes to the lowest class."""
    best, label = probabilities.max(1)
    label = label.to(torch.uint8).masked_fill(best < unsure, IGNORE)
    return label, (best * 255).round().to(torch.uint8)


def _made_from(checkpoint: Path, dataset: Dataset) -> dict[str, str]:
    """The checkpoint, and digests of its weights and of the images: what the data set says of them, and their files
    as rank 0 finds them: a copy on another machine has other times."""
    files = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_bytes())["files"]
    data = hashlib.sha256(json.dumps([dataset.ids, dataset.classes, dataset.long_side]).encode())
    data.update(np.ascontiguousarray(dataset.tags).tobytes())
    for path in filter(None, map(dataset.path, range(len(dataset)))):
        state = path.stat()
        data.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    weights = files["model.safetensors"]["sha256"]
    return {"checkpoint": checkpoint.name, "weights": weights, "data": distributed.from_first(data.hexdigest())}


def _complete(settings: MaskSettings, restored: RestoredRun) -> MaskSettings:
    """Without a field that is None, and with a source that the run trained."""
    bank = restored.model.memory is not None
    heatmaps = restored.config.method.supervision != "masks"
    source = settings.source or ("merged" if bank else "network")
    if source in ("merged", "context") and not bank:
        raise ValueError(f"--source {source} needs a run with a bank (method.context bank): choose network"
                         f"{' or cam' * heatmaps}")  # fmt: skip
    if source == "cam" and not heatmaps:
        raise ValueError("--source cam needs a run trained with tags: heatmaps had no part in this one, which was "
                         "trained with masks (method.supervision masks): choose network")  # fmt: skip
    unsure = UNSURE[settings.refine] if settings.unsure is None else settings.unsure
    return replace(settings, source=source, unsure=unsure)


def _make(restored: RestoredRun, settings: MaskSettings, folder: Path, indices: list[int]) -> None:
    """Write the masks of the images `indices`."""
    dataset = getattr(restored.data, settings.split)
    saliency = restored.saliency if settings.source in ("merged", "cam") else None
    palette = voc_palette(256)
    palette[: len(dataset.palette)] = dataset.palette
    workers = default_workers(restored.config.data.workers, dataset) if indices else 0
    started = said = time.monotonic()
    for done, item in enumerate(eval_items(dataset, saliency, indices=indices, workers=workers), 1):
        with in_words(restored.device, "--scales with smaller factors, or --device cpu"):
            label, confidence = _mask(restored, settings, item)
        image_id = dataset.ids[item.index]
        save_image(Image.fromarray(confidence), folder / "confidence" / f"{image_id}.png", format="PNG")
        save_mask(label, palette, folder / "labels" / f"{image_id}.png")  # last: with it the image is finished
        now = time.monotonic()
        if now - said > PROGRESS_SECONDS:
            said = now
            left = (len(indices) - done) * (now - started) / done
            logger.info("%d of %d masks, %.0f s to go", done, len(indices), left)


@torch.no_grad()
def _mask(restored: RestoredRun, settings: MaskSettings, item: EvalItem) -> tuple[np.ndarray, np.ndarray]:
    """Label and confidence of one image at its full size, uint8 [H, W]."""
    device = restored.device
    saliency = None if item.saliency is None else item.saliency[None].to(device)
    probabilities = soft_masks(
        restored.model, restored.config.method, item.image[None].to(device, memory_format=torch.channels_last),
        item.tags[None].to(device), saliency,
        source=settings.source, scales=settings.scales, flip=settings.flip,
    )  # fmt: skip
    pixels = torch.from_numpy(item.pixels).to(device).permute(2, 0, 1)[None].float() / 255
    probabilities = refine(probabilities, pixels, method=settings.refine)
    return _at_full_size(probabilities[0], item, unsure=settings.unsure)


def _at_full_size(probabilities: Tensor, item: EvalItem, *, unsure: float) -> tuple[np.ndarray, np.ndarray]:
    """Decide over [K, h, w] at the image's full size, uint8 [H, W] twice: only its own classes, a band at a time."""
    own = with_background(item.tags[None])[0].nonzero()[:, 0]
    bands = resized(probabilities[own.to(probabilities.device)], tuple(item.full_size))
    decided = [[part[0].cpu().numpy() for part in decide(wide[None], unsure=unsure)] for _, wide in bands]
    place, confidence = (np.concatenate(parts) for parts in zip(*decided, strict=True))
    values = np.full(256, IGNORE, np.uint8)
    values[: len(own)] = own
    return values[place], confidence


def _measure(dataset: Dataset, folder: Path, device: torch.device) -> dict[str, float | None]:
    """The masks on disk against the ground truth, where there is any; over all ranks."""
    distributed.barrier()
    confusion = ConfusionMatrix(len(dataset.classes) + 1, device)
    pixels = torch.zeros(2, dtype=torch.int64, device=device)  # labelled, all
    for index in share_of_rank(len(dataset)):
        label, truth = read_mask(folder / "labels" / f"{dataset.ids[index]}.png"), dataset.mask(index)
        pixels += torch.tensor([np.count_nonzero(label != IGNORE), label.size], device=device)
        if truth is not None:
            confusion.update(torch.from_numpy(label).to(device), torch.from_numpy(truth).to(device))
    confusion.reduce()
    labelled, total = distributed.sum_(pixels).tolist()
    return {"mask_miou": confusion.miou(), "labelled": 100 * labelled / max(total, 1)}


def _draw(dataset: Dataset, folder: Path) -> None:
    """Lay the masks on disk over their images, this rank's share of those that are not drawn."""
    names = ("background", *dataset.classes)
    for index in share_of_rank(len(dataset)):
        path = folder / OVERLAYS / f"{dataset.ids[index]}.jpg"
        if path.is_file():
            continue
        label = read_mask(folder / "labels" / f"{dataset.ids[index]}.png")
        drawn = Segmentation(label, np.ones(()), names, dataset.palette, dataset.image(index)).overlay()
        save_image(Image.fromarray(drawn), path, format="JPEG", quality=90)
