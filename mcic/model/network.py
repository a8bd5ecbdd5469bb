"""The networks: the one that runs at test time, and the one that trains it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mcic.model.backbones import build_backbone, hidden_width
from mcic.model.heads import classification_head, initialize_head, segmentation_head
from mcic.model.memory import MemoryBank
from mcic.model.propagation import Propagation
from mcic.ops import class_pool, pool_weights
from mcic.pseudo import with_background


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What it takes to build the test-time network again.

    Attributes:
        backbone: name, see `build_backbone`.
        output_stride: image pixels per feature pixel; None: the backbone's own.
        segmentation_head: linear | lfov | aspp.
        num_classes: K, with background.
    """

    backbone: str
    output_stride: int | None
    segmentation_head: str
    num_classes: int


class SegmentationNetwork(nn.Module):
    """Backbone and segmentation head: all that runs at test time.

    Attributes:
        stride: image pixels per feature pixel. Features of an image whose sides are multiples of the stride plus 1
            lie exactly on the pixels 0, stride, 2·stride, …
        trained: names of the modules that begin with weights of an earlier training.
    """

    def __init__(self, spec: NetworkSpec, *, weights: str = "none") -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_backbone(spec.backbone, weights=weights, output_stride=spec.output_stride)
        self.stride = self.backbone.output_stride
        self.segmentation_head = segmentation_head(
            spec.segmentation_head, self.backbone.channels, spec.num_classes,
            output_stride=self.stride, hidden=hidden_width(spec.backbone),
        )  # fmt: skip
        taken = initialize_head(self.segmentation_head, self.backbone.fully_connected)
        self.trained = tuple(["backbone"] * self.backbone.pretrained + [f"segmentation_head.{name}" for name in taken])

    def forward(self, images: Tensor) -> Tensor:
        """Images f32 [B, 3, H, W] (normalised) → logits [B, K, h, w]."""
        return self.segmentation_head(self.backbone(images))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of B images before it looks at the bank.

    Attributes:
        features: f, [B, D, h, w].
        heatmap: h of E1, [B, L, h, w].
        logits: s, [B, K, h, w].
    """

    features: Tensor
    heatmap: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Contexts:
    """Rows for the bank: vectors [R, D], their classes int32 [R] (-1: not to be stored) and images int64 [R]."""

    vectors: Tensor
    labels: Tensor
    image_ids: Tensor


@dataclass(frozen=True, slots=True)
class Augmented:
    """What the network says after it read the bank.

    Attributes:
        logits: s̃, [B, K, h, w].
        heatmap: of f̃, [B, L, h, w], or None where M' does not come from it.
        entropy: of the attention, [B, h·w] in nats.
        update: O(m), [B, D, h, w].
    """

    logits: Tensor
    heatmap: Tensor | None
    entropy: Tensor
    update: Tensor


class MCIC(nn.Module):
    """The whole model: test-time network, classification head, memory bank and propagation.

    Args:
        spec: of the test-time network.
        weights: initial weights of the backbone.
        classification: `linear` or `deep`.
        bank: False leaves out bank and propagation (the control, CAM masks only, full supervision).
        slots, bank_dtype, heads, temperature, attention_threshold, dropout, message_gain: of bank and propagation.
        pool_threshold, confidence_rule: T_b and the rule of E5.
        pixel_bank: store every confident pixel instead of one context per image and class.
        stop_gradient: E16.
        classify_context: also give the classification head's heatmap of f̃.
        ema_momentum: contexts come from a moving average of the network; None: from the network.
        backend: of the hot path.

    Attributes:
        trained: names of the modules that begin with weights of an earlier training: they learn at the smaller rate.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        weights: str = "none",
        classification: str = "linear",
        bank: bool = True,
        slots: int = 64,
        bank_dtype: torch.dtype = torch.float32,
        heads: int = 1,
        temperature: float | None = None,
        attention_threshold: float = 0.0,
        dropout: float = 0.1,
        message_gain: float = 1.0,
        pool_threshold: float = 0.5,
        confidence_rule: str = "paper",
        pixel_bank: bool = False,
        stop_gradient: bool = True,
        classify_context: bool = False,
        ema_momentum: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.pool_threshold = pool_threshold
        self.confidence_rule = confidence_rule
        self.pixel_bank = pixel_bank
        self.stop_gradient = stop_gradient
        self.classify_context = classify_context
        self.ema_momentum = ema_momentum
        self.backend = backend
        self.network = SegmentationNetwork(spec, weights=weights)
        channels = self.network.backbone.channels
        self.classification_head = classification_head(
            classification, channels, spec.num_classes - 1, hidden=hidden_width(spec.backbone)
        )
        taken = initialize_head(self.classification_head, self.network.backbone.fully_connected)
        self.network.backbone.fully_connected = ()
        self.trained = (
            *(f"network.{name}" for name in self.network.trained), *(f"classification_head.{name}" for name in taken)
        )  # fmt: skip
        self.memory: MemoryBank | None = None
        self.propagation: Propagation | None = None
        self.ema: SegmentationNetwork | None = None
        if bank:
            self.memory = MemoryBank(spec.num_classes, slots, channels, dtype=bank_dtype, backend=backend)
            self.propagation = Propagation(
                channels, heads=heads, temperature=temperature, threshold=attention_threshold, dropout=dropout,
                gain=message_gain, backend=backend,
            )  # fmt: skip
            if ema_momentum is not None:
                self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MCIC:
        """Training or evaluation mode; the moving average is always in the latter, without dropout."""
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def forward(self, images: Tensor) -> Prediction:
        """Images f32 [B, 3, H, W] → what the network says without the bank."""
        features = self.network.backbone(images)
        return Prediction(features, self.classification_head(features), self.network.segmentation_head(features))

    @torch.no_grad()
    def pool(self, images: Tensor, prediction: Prediction, tags: Tensor, valid: Tensor, ids: Tensor) -> Contexts:
        """The contexts of a batch (E4, E5), every (image, class) pair a row, or every pixel with a pixel-level bank.

        Args:
            images: read only by the moving average, where there is one.
            prediction: the network's own.
            tags: bool [B, L].
            valid: bool [B, h, w]; pixels outside count in no context.
            ids: int64 [B].
        """
        features, logits = prediction.features, prediction.logits
        if self.ema is not None:
            features = self.ema.backbone(images)
            logits = self.ema.segmentation_head(features)
        confidence = logits.float()
        if self.confidence_rule == "paper":
            confidence = confidence.softmax(1)
        confidence = confidence * valid[:, None]
        classes = with_background(tags)
        if self.pixel_bank:
            return self._pixel_contexts(features, confidence, classes, ids)
        vectors, _, stored = class_pool(
            features, confidence, classes,
            threshold=self.pool_threshold, rule=self.confidence_rule, backend=self.backend,
        )  # fmt: skip
        stored = stored & self.memory.can_hold(vectors)
        labels = torch.arange(classes.shape[1], device=ids.device, dtype=torch.int32).where(stored, -1)
        return Contexts(vectors.flatten(0, 1), labels.flatten(), ids.repeat_interleave(classes.shape[1]))

    def _pixel_contexts(self, features: Tensor, confidence: Tensor, classes: Tensor, ids: Tensor) -> Contexts:
        weights = pool_weights(confidence, classes, threshold=self.pool_threshold, rule=self.confidence_rule)
        best, label = weights.flatten(2).max(1)  # [B, N]
        labels = label.to(torch.int32).masked_fill(best == 0, -1)
        vectors = features.flatten(2).transpose(1, 2).flatten(0, 1).float()
        labels = labels.flatten().where(self.memory.can_hold(vectors), -1)
        return Contexts(vectors, labels, ids.repeat_interleave(best.shape[1]))

    def read(self, prediction: Prediction, tags: Tensor) -> Augmented:
        """Read the bank and predict again from the augmented features (E7–E10, E16)."""
        features = prediction.features.detach() if self.stop_gradient else prediction.features
        reading = self.propagation(features, self.memory.entries, self.memory.counts, with_background(tags))
        augmented = features + reading.update
        logits = self._apply_head(self.network.segmentation_head, augmented)
        heatmap = self._apply_head(self.classification_head, augmented) if self.classify_context else None
        return Augmented(logits, heatmap, reading.entropy, reading.update)

    def _apply_head(self, head: nn.Module, features: Tensor) -> Tensor:
        if not self.stop_gradient:
            return head(features)
        frozen = {name: parameter.detach() for name, parameter in head.named_parameters()}
        return functional_call(head, frozen, (features,))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the network; without one, nothing."""
        if self.ema is not None:
            averages, current = list(self.ema.parameters()), list(self.network.parameters())
            torch._foreach_lerp_(averages, current, 1 - self.ema_momentum)
            for average, buffer in zip(self.ema.buffers(), self.network.buffers(), strict=True):
                average.copy_(buffer)


def feature_valid(valid: Tensor, size: torch.Size) -> Tensor:
    """bool [B, H, W] of the image → bool [B, h, w] of the feature grid, corners aligned."""
    if valid.shape[-2:] == size:
        return valid
    resized = F.interpolate(valid[:, None].float(), size=tuple(size), mode="bilinear", align_corners=True)
    return resized[:, 0] > 0.999
