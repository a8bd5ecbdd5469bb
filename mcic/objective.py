"""One training step's arithmetic: masks, loss terms and their sum (E14), from a batch and the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mcic import distributed
from mcic.config import MethodConfig
from mcic.losses import (
    classification_loss,
    entropy_loss,
    labelled_pixels,
    segmentation_loss,
    weighted_segmentation_loss,
)
from mcic.model import MCIC, Augmented, Contexts, Prediction, feature_valid
from mcic.ops import pseudo_masks, segmentation_losses
from mcic.pseudo import IGNORE, cam_scores, context_scores, mask_from_scores, merge_masks, resize_like
from mcic.refine import refine_rows

from .data.base import Batch

Scores = TypeVar("Scores", Prediction, Augmented)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A step's results.

    Attributes:
        total: the loss to differentiate, this rank's share.
        terms: name → detached scalar of each loss term, unweighted, this rank's share; further figures of the step.
        contexts: rows still to be pushed after the backward pass, or None.
    """

    total: Tensor
    terms: dict[str, Tensor]
    contexts: Contexts | None


@dataclass(frozen=True, slots=True)
class Masks:
    """M, M' and M'' of a batch, uint8 [3, B, h, w]; M alone [1, B, h, w] where a configuration makes no others."""

    stacked: Tensor

    @property
    def context(self) -> Tensor | None:
        """M', if there is one."""
        return self.named().get("context")

    def named(self) -> dict[str, Tensor]:
        """Name → mask uint8 [B, h, w], only those that exist."""
        return dict(zip(("cam", "context", "merged"), self.stacked, strict=False))

    def chosen(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
        """The masks that exist of `names`, as (their names, uint8 [M, B, h, w])."""
        named = self.named()
        kept = tuple(name for name in named if name in names)
        return kept, self.stacked if len(kept) == len(named) else torch.stack([named[name] for name in kept])


class Objective:
    """The losses of the method under one (resolved) configuration.

    Args:
        method: the configuration.
        backend: who computes masks and segmentation losses.
    """

    def __init__(self, method: MethodConfig, *, backend: str = "auto") -> None:
        self.method = method
        self.backend = backend

    def masks(
        self,
        prediction: Prediction,
        augmented: Augmented | None,
        tags: Tensor,
        saliency: Tensor | None,
        valid: Tensor | None,
        images: Tensor,
    ) -> Masks:
        """The masks of a batch on the grid of its logits; M' comes from s itself where there is no bank (the control).

        `images` [B, 3, H, W] of any size are read by the refinement only.
        """
        method = self.method
        logits = context_heatmap = None
        if method.context != "none":
            logits = prediction.logits if augmented is None else augmented.logits
            if augmented is not None and augmented.heatmap is not None:
                logits, context_heatmap = None, augmented.heatmap
        if saliency is not None:
            saliency = resize_like(saliency, prediction.heatmap.shape[-2:])
        if method.refinement != "none":
            rows = [self._cam_rows(prediction.heatmap, tags, saliency, valid)]
            if context_heatmap is not None:
                rows.append(self._cam_rows(context_heatmap, tags, saliency, valid))
            elif logits is not None:
                rows.append(self._context_rows(logits, tags, saliency))
            masks = self._from_rows(rows, valid, images)
            if len(masks) == 2:
                masks.append(merge_masks(*masks, rules=method.merge_rule))
            return Masks(torch.stack(masks))
        stacked = pseudo_masks(
            prediction.heatmap, tags, saliency, valid, logits=logits, context_heatmap=context_heatmap,
            threshold=method.cam_threshold, cam_background=method.cam_background,
            background_power=method.background_power, context_background=method.context_background,
            saliency_weight=method.saliency_weight, merge_rule=method.merge_rule, backend=self.backend,
        )  # fmt: skip
        return Masks(stacked)

    def context_mask(
        self, logits: Tensor, tags: Tensor, saliency: Tensor | None, valid: Tensor | None, images: Tensor
    ) -> Tensor:
        """E11 under this configuration."""
        return self._from_rows([self._context_rows(logits, tags, saliency)], valid, images)[0]

    def _from_rows(self, rows: list[Tensor], valid: Tensor | None, images: Tensor) -> list[Tensor]:
        """E3 on rows that are refined first: all with the same neighbours, so together. What a crop padded is no
        neighbour: refined values are means over the valid ones."""
        method, stacked = self.method.refinement, torch.cat(rows, 1)
        if method != "none" and valid is not None:
            share = valid[:, None].to(stacked.dtype)
            stacked = refine_rows(torch.cat([stacked * share, share], 1), images, method=method)
            stacked = stacked[:, :-1] / stacked[:, -1:].clamp(min=torch.finfo(stacked.dtype).tiny)
        else:
            stacked = refine_rows(stacked, images, method=method)
        masks = stacked.split(rows[0].shape[1], 1)
        return [mask_from_scores(each, threshold=self.method.cam_threshold, valid=valid) for each in masks]

    def _cam_rows(self, heatmap: Tensor, tags: Tensor, saliency: Tensor | None, valid: Tensor | None) -> Tensor:
        method = self.method
        return cam_scores(
            heatmap, tags, saliency, threshold=method.cam_threshold, rules=method.cam_background,
            background_power=method.background_power, valid=valid,
        )  # fmt: skip

    def _context_rows(self, logits: Tensor, tags: Tensor, saliency: Tensor | None) -> Tensor:
        method = self.method
        return context_scores(
            logits, tags, saliency, saliency_weight=method.saliency_weight, rules=method.context_background
        )  # fmt: skip

    def __call__(self, model: MCIC, batch: Batch, ramp: Tensor) -> StepOutput:
        """Run the model on a batch and add up E14.

        Args:
            model: in training mode; its bank is pushed to when the method lets an image read itself.
            batch: a rank's part of the global batch.
            ramp: λ of E15, a scalar tensor on the device.
        """
        prediction = model(batch.images)
        valid = self._valid(batch, prediction.features)
        if self.method.supervision == "full":
            return self._full(prediction, batch, valid, ramp)
        if self.method.supervision == "masks":
            return self._given_masks(prediction, batch)
        contexts, augmented = self._context_branch(model, prediction, batch, valid)
        fine = self._on_mask_grid(prediction), augmented and self._on_mask_grid(augmented)
        masks = self.masks(*fine, batch.tags, batch.saliency, self._valid(batch, fine[0].logits), batch.images)
        segmentation, parts = self._segmentation(*fine, masks, ramp)
        losses = {  # name → (this rank's share of it, its weight)
            "classification": (self._classification(prediction, batch.tags, valid), 1),
            "segmentation": (segmentation, ramp * self.method.segmentation_weight),
        }
        if augmented is not None:
            entropy = entropy_loss(augmented.entropy, valid, count=distributed.sum_(valid.sum()))
            losses["entropy"] = (entropy, ramp * self.method.entropy_weight)
        total = sum(weight * loss for loss, weight in losses.values())
        terms = {f"loss/{name}": loss for name, (loss, _) in losses.items()} | parts | {"loss/total": total}
        figures = self._figures(prediction, augmented, masks, model)
        return StepOutput(total, {k: v.detach() for k, v in (terms | figures).items()}, contexts)

    def _valid(self, batch: Batch, maps: Tensor) -> Tensor:
        """bool [B, h, w] on the grid of `maps` [B, C, h, w]: where the crop shows the image."""
        valid = feature_valid(batch.valid, maps.shape[-2:])
        return torch.ones_like(valid) if self.method.padding_rule == "authors" else valid

    def _on_mask_grid(self, scores: Scores) -> Scores:
        """The same with its logits and heatmap on the grid of the masks, `mask_upsampling` times as fine."""
        factor = self.method.mask_upsampling
        return replace(scores, logits=finer(scores.logits, factor), heatmap=finer(scores.heatmap, factor))

    def _context_branch(
        self, model: MCIC, prediction: Prediction, batch: Batch, valid: Tensor
    ) -> tuple[Contexts | None, Augmented | None]:
        if model.memory is None:
            return None, None
        rows = model.pool(batch.images, prediction, batch.tags, valid, batch.indices)
        gather = distributed.gather_rows
        contexts = Contexts(gather(rows.vectors), gather(rows.labels), gather(rows.image_ids))
        if self.method.self_read:
            push(model, contexts)
            contexts = None
        return contexts, model.read(prediction, batch.tags)

    def _classification(self, prediction: Prediction, tags: Tensor, valid: Tensor) -> Tensor:
        return self._shared(
            classification_loss(prediction.heatmap, tags, valid=valid, rules=self.method.classification_rule)
        )

    def _segmentation(
        self, prediction: Prediction, augmented: Augmented | None, masks: Masks, ramp: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ over the supervising masks of L_seg(s, ·) + L_seg(s̃, ·), and each of them by the name of its term."""
        names, chosen = masks.chosen(self.method.masks)
        context_logits = None if augmented is None else augmented.logits
        counts = distributed.sum_(labelled_pixels(chosen))
        losses = segmentation_losses(prediction.logits, context_logits, chosen, counts=counts, backend=self.backend)
        branches = zip("sc", losses, strict=False)
        parts = {f"loss/{b}_{name}": loss for b, row in branches for name, loss in zip(names, row, strict=True)}
        cam_factor = torch.clamp(1 - ramp, min=self.method.cam_floor)
        factors = [cam_factor if name == "cam" else torch.ones_like(ramp) for name in names]
        return (losses * torch.stack(factors)).sum(), parts

    def _full(self, prediction: Prediction, batch: Batch, valid: Tensor, ramp: Tensor) -> StepOutput:
        """Ground-truth masks in the place of M, M' and M'', weighted as they are together."""
        logits = finer(prediction.logits, self.method.mask_upsampling)
        truth = sample_grid(batch.masks, logits.shape[-2:]).masked_fill(~self._valid(batch, logits), IGNORE)
        count = distributed.sum_(labelled_pixels(truth))
        classification = self._classification(prediction, batch.tags, valid)
        loss = segmentation_loss(logits, truth, count=count, backend=self.backend)
        segmentation = len(self.method.masks) * loss
        total = classification + ramp * self.method.segmentation_weight * segmentation
        terms = {"loss/classification": classification, "loss/segmentation": segmentation, "loss/total": total}
        return StepOutput(total, {name: term.detach() for name, term in terms.items()}, None)

    def _given_masks(self, prediction: Prediction, batch: Batch) -> StepOutput:
        """Masks from elsewhere, at the pixels of the crop, weighted with their confidence: L_seg(s, ·) alone."""
        size, masks = batch.images.shape[-2:], batch.masks
        logits = F.interpolate(prediction.logits.float(), size=size, mode="bilinear", align_corners=True)
        confidence = batch.confidence * (masks != IGNORE)
        total = distributed.sum_(confidence.sum())
        loss = weighted_segmentation_loss(logits, masks, confidence, total=total)
        coverage = self._shared(labelled_pixels(masks) / masks.numel() * 100)
        terms = {"loss/segmentation": loss.detach(), "loss/total": loss.detach(), "coverage/given": coverage}
        return StepOutput(loss, terms, None)

    def _figures(
        self, prediction: Prediction, augmented: Augmented | None, masks: Masks, model: MCIC
    ) -> dict[str, Tensor]:
        covered = self._shared(labelled_pixels(masks.stacked) / masks.stacked[0].numel() * 100)
        figures = {f"coverage/{name}": share for name, share in zip(masks.named(), covered, strict=True)}
        if augmented is not None:
            figures["feature_norm"] = self._shared(prediction.features.float().norm(dim=1).mean())
            figures["message_norm"] = self._shared(augmented.update.float().norm(dim=1).mean())
            figures["bank_fill"] = self._shared(model.memory.fill())
        return figures

    def _shared(self, mean: Tensor) -> Tensor:
        """This rank's share of a mean over the global batch: the shares add up to it."""
        return mean / distributed.world_size()


def push(model: MCIC, contexts: Contexts) -> None:
    """Append contexts to the model's bank."""
    model.memory.push(contexts.vectors, contexts.labels, contexts.image_ids)


def finer(maps: Tensor | None, factor: int) -> Tensor | None:
    """[B, C, h, w] on a grid with `factor` steps for one, [B, C, (h-1)·factor + 1, (w-1)·factor + 1], by bilinear
    interpolation; None stays None. Half precision becomes fp32: the backward pass adds up many gradients in a cell."""
    if maps is None or factor == 1:
        return maps
    size = [(side - 1) * factor + 1 for side in maps.shape[-2:]]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def sample_grid(masks: Tensor, size: torch.Size) -> Tensor:
    """uint8 [B, H, W] read at the places of a feature grid [h, w] whose corners lie on the image's."""
    rows = torch.linspace(0, masks.shape[1] - 1, size[0], device=masks.device).round().long()
    columns = torch.linspace(0, masks.shape[2] - 1, size[1], device=masks.device).round().long()
    return masks[:, rows[:, None], columns]
