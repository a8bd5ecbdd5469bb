"""Whole training steps on random data: networks, context branch, masks, losses, backward pass and optimizer.

The published step runs in its own precision, fp32, with the arithmetic of `bench.published`, tensors in PyTorch's
usual order and one cross-entropy per pair of map and mask; PyTorch's defaults allow tf32 in convolutions for every
variant. The networks are random, so few pixels are confident enough to be stored, which spares the published push
most of its loop. `network alone` is forward, backward and optimizer without context branch, masks and losses: what
those cost is the difference. Variants are measured one after the other, as they do not fit in memory together.
On a CPU a tiny network stands in: a check that everything runs, not a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from mcic.kernels import pseudo_masks
from torch import Tensor
from torch.func import functional_call

from bench import published
from bench.engine import CaptureError, fastest, launches_and_syncs, reason, release
from bench.results import Row
from bench.timing import Samples, measure
from mcic.build import build_model, peak_memory
from mcic.config import Config
from mcic.data.base import Batch
from mcic.losses import classification_loss
from mcic.model import MCIC
from mcic.objective import Objective
from mcic.optim import build_optimizer
from mcic.presets import preset
from mcic.pseudo import with_background
from mcic.update import GraphedUpdate, Update

CASES = ("voc12-vgg16", "voc12-resnet101")
CLASSES = 21
LR = 1e-5

Step = Callable[[Batch, Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to take a step.

    Attributes:
        make: model and configuration → the step. backend: of the model.
        dtype: of the forward pass. channels_last: order of images and weights.
        compiled: backbone under torch.compile. graph: the step as one CUDA graph.
    """

    make: Callable[[MCIC, Config, torch.dtype], Step]
    backend: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    compiled: bool = False
    graph: bool = False


class PublishedStep:
    """The step as published (see the module's docstring)."""

    def __init__(self, model: MCIC, config: Config, dtype: torch.dtype) -> None:
        self.model, self.method, self.dtype = model, config.method, dtype
        memory = model.memory
        classes, slots, channels = memory.entries.shape
        device = memory.entries.device
        self.layer = published.PublishedPropagation(channels, dropout=self.method.dropout).to(device)
        self.layer.load_state_dict(model.propagation.state_dict())
        self.bank = published.PublishedBank(classes, slots, channels, device=device, dtype=memory.entries.dtype)
        self.bank.load(memory.entries, memory.counts, memory.cursor)
        self.parameters = [
            *model.network.parameters(), *model.classification_head.parameters(), *self.layer.parameters()
        ]  # fmt: skip
        train = config.train
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=LR, momentum=train.momentum, weight_decay=train.weight_decay
        )

    def __call__(self, batch: Batch, ramp: Tensor) -> None:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(batch, ramp)
        loss.backward()
        self.optimizer.step()

    def loss(self, batch: Batch, ramp: Tensor) -> Tensor:
        """E14."""
        method, head = self.method, self.model.network.segmentation_head
        prediction = self.model(batch.images)
        classes = with_background(batch.tags)
        features = prediction.features.detach()
        confidence = prediction.logits.detach().softmax(1)
        rows, labels = published.pool(features, confidence, classes, threshold=method.pool_threshold)
        self.bank.push(rows.to(self.bank.queues[0].dtype), labels)
        memory, labels = self.bank.pull(classes.any(0))
        augmented, entropy = self.layer(features, memory, labels, classes)
        frozen = {name: parameter.detach() for name, parameter in head.named_parameters()}
        logits = functional_call(head, frozen, (augmented,))
        saliency = F.interpolate(
            batch.saliency[:, None], size=tuple(logits.shape[-2:]), mode="bilinear", align_corners=True
        )
        masks = pseudo_masks(
            prediction.heatmap.detach(), batch.tags, saliency[:, 0], logits=logits.detach(),
            threshold=method.cam_threshold, backend="reference",
        )  # fmt: skip
        classification = classification_loss(prediction.heatmap, batch.tags)
        segmentation = published.losses(prediction.logits, logits, masks).sum()
        return classification + ramp * (entropy.mean() + segmentation)


class NetworkStep:
    """Forward, backward from given gradients of heatmap and logits, and optimizer: no context branch, no losses."""

    def __init__(self, model: MCIC, config: Config, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.optimizer = _optimizer(model, config)
        self.gradients: list[Tensor] = []

    def __call__(self, batch: Batch, ramp: Tensor) -> dict[str, Tensor]:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.model(batch.images)
        maps = [prediction.heatmap, prediction.logits]
        if not self.gradients:
            self.gradients = [torch.randn_like(scores) / scores.numel() for scores in maps]
        torch.autograd.backward(maps, self.gradients)
        self.optimizer.step()
        return {}


def package_step(model: MCIC, config: Config, dtype: torch.dtype) -> Update:
    """The step of the trainer."""
    scaler = torch.amp.GradScaler(enabled=False)
    return Update(
        model, Objective(config.method, backend=model.backend), _optimizer(model, config), scaler, dtype=dtype
    )


def _optimizer(model: MCIC, config: Config) -> torch.optim.Optimizer:
    train = config.train
    return build_optimizer(model, lr=LR, new_layer_lr=1.0, momentum=train.momentum, weight_decay=train.weight_decay)


VARIANTS = {
    "published": Variant(make=PublishedStep, backend="reference", dtype=torch.float32, channels_last=False),
    "fused": Variant(make=package_step),
    "fused, graph": Variant(make=package_step, graph=True),
    "network alone, graph": Variant(make=NetworkStep, backend="reference", graph=True),
    "published arithmetic": Variant(make=PublishedStep, backend="reference"),
    "reference": Variant(make=package_step, backend="reference"),
    "network alone": Variant(make=NetworkStep, backend="reference"),
    "fused, backbone compiled": Variant(make=package_step, compiled=True),
    "fused, backbone compiled, graph": Variant(make=package_step, compiled=True, graph=True),
    "published, backbone compiled": Variant(
        make=PublishedStep, backend="reference", dtype=torch.float32, channels_last=False, compiled=True
    ),
}
"""what the targets need first, what compiles for minutes last: a time limit may cut the list"""


def configuration(name: str, device: torch.device) -> Config:
    """The preset with random weights; on a CPU at a tiny size."""
    config = preset(name)
    model, train = dataclasses.replace(config.model, weights="none"), config.train
    if device.type == "cpu":
        model = dataclasses.replace(model, backbone="tiny", segmentation_head="linear")
        train = dataclasses.replace(train, size=33, batch_size=2)
    return dataclasses.replace(config, model=model, train=train).resolved()


def random_batch(config: Config, device: torch.device) -> Batch:
    """A batch of noise, two tags an image."""
    size, batch = config.train.size, config.train.batch_size
    tags = torch.zeros(batch, CLASSES - 1, dtype=torch.bool)
    tags.scatter_(1, torch.rand(tags.shape).argsort(1)[:, :2], True)
    return Batch(
        images=torch.randn(batch, 3, size, size), tags=tags, saliency=torch.rand(batch, size, size),
        masks=None, confidence=None,
        valid=torch.ones(batch, size, size, dtype=torch.bool), indices=torch.arange(batch),
    ).to(device)  # fmt: skip


def build(variant: Variant, config: Config, device: torch.device) -> Step:
    """The step of a variant, with a full bank."""
    if variant.graph and device.type != "cuda":
        raise ValueError("CUDA graphs need a GPU")
    if variant.compiled and device.type != "cuda":
        raise ValueError("measured on a GPU only")
    if variant.backend == "auto":
        fastest("sparse_attention", torch.empty(0, device=device, dtype=variant.dtype))
    torch.manual_seed(0)
    model = build_model(config.model, config.method, num_classes=CLASSES, backend=variant.backend)
    model.to(device, memory_format=torch.channels_last if variant.channels_last else torch.contiguous_format)
    model.memory.entries.normal_()
    model.memory.counts.fill_(model.memory.entries.shape[1])
    model.train()
    if variant.compiled:
        model.network.backbone.compile()
    made = variant.make(model, config, variant.dtype)
    return GraphedUpdate(made) if variant.graph else made


def run(
    name: str, device: torch.device, *, rounds: int, warmup: int, done: Collection[str] = ()
) -> Iterator[Row]:  # fmt: skip
    """The rows of one network, but for the variants that are done.

    Raises:
        CaptureError: after the row of a variant that could not be recorded as a CUDA graph.
    """
    config = configuration(name, device)
    batch = random_batch(config, device)
    contiguous = dataclasses.replace(batch, images=batch.images.contiguous())
    ramp = torch.ones((), device=device)
    first: Samples | None = None
    for label, variant in VARIANTS.items():
        if label in done:
            continue
        images = batch if variant.channels_last else contiguous
        row = Row(
            group="step", name=name, case=f"{config.train.size}², batch {config.train.batch_size}", scope="step",
            work="training step", variant=label, dtype=str(variant.dtype).removeprefix("torch."),
            timed="events" if device.type == "cuda" else "clock",
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = build(variant, config, device)
            call = partial(step, images, ramp)
            if device.type == "cuda":
                for _ in range(warmup):  # also past the recording of a graph
                    call()
                row.extra_mib = 1024 * peak_memory(device)  # before measuring takes memory of its own
            taken = measure({label: call}, device, rounds=rounds, warmup=warmup)
            if device.type == "cuda":
                row.launches, row.syncs = launches_and_syncs(call)
        except Exception as error:  # a variant that cannot run has its reason as its row, the others go on
            row.note = reason(error)
        else:
            first = taken[label] if label == "published" else first
            _fill(row, taken[label], first, config.train.batch_size, device)
        step = call = None
        if row.note and variant.graph and device.type == "cuda":
            yield row
            raise CaptureError(label, row.note)
        torch.compiler.reset()
        release(device)
        yield row


def _fill(row: Row, taken: Samples, published_step: Samples | None, images: int, device: torch.device) -> None:
    row.p20_ms, row.p50_ms, row.p80_ms = (1e3 * taken.quantile(share) for share in (0.2, 0.5, 0.8))
    row.images_per_s = images / taken.median
    if published_step is not None:
        row.speedup = published_step.median / taken.median
    if device.type != "cuda":
        row.note = "tiny network on a CPU: not comparable with anything"
