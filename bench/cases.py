"""The sizes that are measured, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ContextCase:
    """A batch in front of a full bank.

    Attributes:
        batch: B. side: of the square feature grid, N = side². channels: D = E. classes: K. slots: S.
        objects: object classes of each image; background comes on top.
        threshold: θ.
    """

    batch: int
    side: int
    channels: int
    classes: int
    slots: int
    objects: int
    threshold: float = 0.0

    def describe(self) -> str:
        """The sizes on one line."""
        size = f"B{self.batch} {self.side}×{self.side} D{self.channels} {self.classes}×{self.slots}"
        return f"{size}, {self.objects + 1} classes an image, θ {self.threshold:g}"

    def class_mask(self) -> Tensor:
        """Background and `objects` random classes of each image, bool [B, K]."""
        chosen = torch.rand(self.batch, self.classes - 1).argsort(1)[:, : self.objects] + 1
        mask = torch.zeros(self.batch, self.classes, dtype=torch.bool)
        mask[:, 0] = True
        return mask.scatter_(1, chosen, True)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random inputs, drawn on the CPU so that every device gets the same."""
        b, d, k, side = self.batch, self.channels, self.classes, self.side
        class_mask = self.class_mask()
        # Each row of pixels belongs to one of the image's classes, so that all of them are pooled.
        own = class_mask.nonzero()[:, 1].view(b, -1)  # [B, objects + 1]
        label = own[:, torch.arange(side) % own.shape[1]][:, None, :, None].expand(-1, -1, -1, side)
        logits = torch.randn(b, k, side, side).scatter_add_(1, label, torch.full(label.shape, 8.0))

        def maps(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype).contiguous(memory_format=torch.channels_last)

        return Inputs(
            case=self,
            features=maps(torch.randn(b, d, side, side)),
            confidence=maps(logits.softmax(1)),
            class_mask=class_mask.to(device),
            entries=torch.randn(k, self.slots, d).to(device, dtype if dtype == torch.float64 else torch.float32),
            ids=torch.arange(b, device=device),
            grad_augmented=maps(torch.randn(b, d, side, side)),
            grad_entropy=torch.full((b, side * side), 1 / (b * side * side), device=device).to(dtype),
        )


@dataclass(frozen=True)
class Inputs:
    """Inputs of a case: features [B, D, H, W], confidence [B, K, H, W], class_mask bool [B, K], entries [K, S, D]
    in f32 (f64 for f64), ids int64 [B], and gradients of augmented features [B, D, H, W] and entropy [B, N]."""

    case: ContextCase
    features: Tensor
    confidence: Tensor
    class_mask: Tensor
    entries: Tensor
    ids: Tensor
    grad_augmented: Tensor
    grad_entropy: Tensor


def _voc(channels: int, **changes: int) -> ContextCase:
    return ContextCase(
        **{"batch": 16, "side": 41, "channels": channels, "classes": 21, "slots": 64, "objects": 2} | changes
    )


def _coco(slots: int) -> ContextCase:
    return ContextCase(batch=16, side=53, channels=512, classes=81, slots=slots, objects=2)


CONTEXTS = {
    "c1": _voc(1024),
    "vgg": _voc(512),
    "resnet": _voc(2048),
    "coco": _coco(64),
    "pixels-512": _coco(512),
    "pixels-4096": _coco(4096),
    "pixels-16384": _coco(16384),
    "small": _voc(256, batch=2, side=21),
    "tiny": ContextCase(batch=2, side=5, channels=16, classes=4, slots=8, objects=1),
}
"""name → sizes of a batch and a bank"""

DEFAULT = {
    "cuda": ("c1", "vgg", "resnet", "coco", "pixels-4096", "pixels-512", "pixels-16384"),
    "cpu": ("small",),
}
"""device → cases of the operations that run when none is named, what the targets need first: a time limit may cut the
list"""

DETAILED = ("c1", "vgg", "tiny")
"""cases whose baselines are also compiled and whose launches are counted: both are slow to find out, and the other
cases differ in sizes alone"""
