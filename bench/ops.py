"""The operations beside the attention: pooling, push, masks and losses; and which tasks a run consists of.

The published form of masks and losses is plain PyTorch as in our references: `eager` is the reference backend, and
for the losses also one `F.cross_entropy` for each pair of a map and a mask, as one would write it. Whatever reads no
value on the host is also replayed as a CUDA graph, a baseline like our own form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from mcic.kernels import class_pool, pseudo_masks, ring_push_, segmentation_losses
from torch import Tensor

from bench import attention, published
from bench import counts as work
from bench.cases import CONTEXTS, DETAILED, Inputs
from bench.engine import Named, Task, Variant, compiled_here, fastest

F32 = torch.float32


def pool_tasks(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """Pooling under both rules: probabilities in f32 under `paper`, raw logits under `authors`."""
    inputs = CONTEXTS[name].inputs(device, dtype)
    mask = inputs.class_mask
    for rule in ("paper", "authors"):
        confidence = inputs.confidence.float()
        confidence = confidence if rule == "paper" else confidence.log() + 8
        features = inputs.features

        def ours(backend: str, features: Tensor = features, c: Tensor = confidence, rule: str = rule) -> Named:
            contexts, sums, _ = class_pool(features, c, mask, threshold=0.5, rule=rule, backend=backend)
            return {"contexts": contexts, "sums": sums}

        def theirs(
            function: Callable = published.pool, c: Tensor = confidence, x: Inputs = inputs, rule: str = rule
        ) -> Callable[[], Named]:
            return lambda: {"rows": function(x.features, c, mask, threshold=0.5, rule=rule)[0]}

        def expected(ours: Callable = ours, features: Tensor = features) -> Named:
            found = ours("reference", features.float())
            return found | {"rows": found["contexts"][found["contexts"].abs().sum(-1) > 0]}

        yield Task(
            name="class_pool", case=f"{name} ({inputs.case.describe()}), {rule}", scope="op", work="forward",
            dtype=dtype, cost=work.class_pool(features, confidence, mask),
            variants={
                "fused": Variant(
                    lambda ours=ours: fastest("class_pool", inputs.features) and (lambda: ours("auto")), graph=True
                ),
                "published": Variant(theirs),
                "published, compiled": Variant(
                    lambda theirs=theirs: compiled_here(device, name)
                    and theirs(torch.compile(published.pool, dynamic=False))
                ),
                "reference": Variant(lambda ours=ours: lambda: ours("reference"), graph=True),
            },
            expected=torch.no_grad()(expected), detailed=name in DETAILED,
        )  # fmt: skip


def push_task(device: torch.device) -> Task:
    """A batch of pooled contexts, a row for every image and class (R = 336 of VOC), most of them not to be stored."""
    case = CONTEXTS["c1"] if device.type == "cuda" else CONTEXTS["small"]
    mask = case.class_mask()
    labels = torch.arange(case.classes, dtype=torch.int32).where(mask, -1).flatten().to(device)
    rows = torch.randn(len(labels), case.channels, device=device)
    ids = torch.arange(case.batch, device=device).repeat_interleave(case.classes)

    def bank() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        entries = torch.randn(case.classes, case.slots, case.channels).to(device)
        counts = torch.full((case.classes,), case.slots, dtype=torch.int32, device=device)
        return entries, torch.full((case.classes, case.slots), -1, device=device), counts, counts * 0

    def ours(backend: str) -> Callable[[], Named]:
        entries, slots, counts, cursor = bank()

        def run() -> Named:
            ring_push_(entries, slots, counts, cursor, rows, labels, ids, backend=backend)
            return {"sum": entries.sum(1)} if first.pop("", False) else {}

        first = {"": True}  # compared after the first push only: the sum is no part of the push
        return run

    def theirs() -> Callable[[], Named]:
        queues = published.PublishedBank(case.classes, case.slots, case.channels, device=device, dtype=F32)
        entries, _, counts, cursor = bank()
        queues.load(entries, counts, cursor)
        stored = labels >= 0
        picked, classes = rows[stored], labels[stored].long()

        def run() -> Named:
            queues.push(picked, classes)
            return {"sum": torch.stack([queue.sum(0) for queue in queues.queues])} if first.pop("", False) else {}

        first = {"": True}
        return run

    return Task(
        name="ring_push_", case=f"R {len(labels)}, D{case.channels}, {case.classes}×{case.slots}", scope="op",
        work="forward", dtype=F32, cost=work.ring_push(bank()[0], rows, labels),
        variants={
            "fused": Variant(lambda: fastest("ring_push_", rows) and ours("auto"), graph=True),
            "published": Variant(theirs),
            "reference": Variant(lambda: ours("reference"), graph=True),
        },
        expected=lambda: ours("reference")(),
    )  # fmt: skip


def mask_task(name: str, device: torch.device, dtype: torch.dtype) -> Task:
    """M, M' and M'' from heatmap and augmented logits, with saliency, paper rules."""
    case = CONTEXTS[name]
    grid = (case.side, case.side)
    heatmap = torch.randn(case.batch, case.classes - 1, *grid).to(device, dtype)
    logits = 3 * torch.randn(case.batch, case.classes, *grid).to(device, dtype)
    tags = case.class_mask()[:, 1:].to(device)
    saliency = torch.rand(case.batch, *grid).to(device)
    valid = torch.ones(case.batch, *grid, dtype=torch.bool, device=device)

    def masks(backend: str) -> Named:
        return {"masks": pseudo_masks(heatmap, tags, saliency, valid, logits=logits, threshold=0.1, backend=backend)}

    return Task(
        name="pseudo_masks", case=f"{name} ({case.describe()})", scope="op", work="forward", dtype=dtype,
        cost=work.pseudo_masks(heatmap, logits, tags, saliency=True), baseline="eager",
        variants=_plain_variants("pseudo_masks", name, heatmap, masks), expected=lambda: masks("reference"),
        detailed=name in DETAILED,
    )  # fmt: skip


def loss_tasks(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """Six cross-entropies: two maps, three masks of which a quarter is ignored."""
    case = CONTEXTS[name]
    shape = (case.batch, case.classes, case.side, case.side)
    maps = [torch.randn(shape).to(device, dtype) for _ in range(2)]
    masks = torch.randint(0, case.classes, (3, case.batch, *shape[2:]), dtype=torch.uint8)
    masks = masks.masked_fill(torch.rand(masks.shape) < 0.25, 255).to(device)
    weights = torch.rand(2, 3, device=device)

    def leaves() -> list[Tensor]:  # of each variant its own, which belong to the stream that it is built on
        return [each.detach().requires_grad_() for each in maps]

    def forward(compute: Callable[..., Tensor]) -> Callable[[], Named]:
        own = leaves()
        return lambda: {"losses": compute(*own, masks).detach()}

    def backward(compute: Callable[..., Tensor]) -> Callable[[], Named]:
        own = leaves()
        losses = compute(*own, masks)

        def run() -> Named:
            found = torch.autograd.grad(losses, own, weights.to(losses.dtype), retain_graph=True)
            return dict(zip(("s", "s~"), found, strict=True))

        return run

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda s, c, m: segmentation_losses(s, c, m, backend=backend)

    forms = {
        "fused": lambda: fastest("segmentation_losses", maps[0]) and ours("auto"),
        "eager": lambda: ours("reference"),
        "six cross-entropies": lambda: published.losses,
        "six cross-entropies, compiled": cache(
            lambda: compiled_here(device, name) and torch.compile(published.losses, dynamic=False)
        ),
    }
    steps = (
        ("forward", forward, work.segmentation_losses_forward(maps[0], masks)),
        ("backward", backward, work.segmentation_losses_backward(maps[0], masks)),
    )
    for step, runner, cost in steps:
        yield Task(
            name="segmentation_losses", case=f"{name} ({case.describe()})", scope="op", work=step, dtype=dtype,
            cost=cost, baseline="six cross-entropies",
            variants={
                k: Variant(lambda form=form, runner=runner: runner(form()), graph=True) for k, form in forms.items()
            },
            expected=lambda runner=runner: runner(ours("reference"))(), detailed=name in DETAILED,
        )  # fmt: skip


def _plain_variants(operation: str, case: str, like: Tensor, compute: Callable[[str], Named]) -> dict[str, Variant]:
    """Fused, eager and compiled form of an operation whose reference is what one would write."""

    compiled = cache(
        lambda: compiled_here(like.device, case) and torch.compile(lambda: compute("reference"), dynamic=False)
    )
    return {
        "fused": Variant(lambda: fastest(operation, like) and (lambda: compute("auto")), graph=True),
        "eager": Variant(lambda: lambda: compute("reference"), graph=True),
        "compiled": Variant(compiled, graph=True),
    }


def tasks(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], Iterator[Task]]]:
    """One thunk of tasks after the other, case by case: a time limit may cut the list. A thunk makes its tensors when
    it is called. Banks of pixels differ from `coco` in the attention alone."""
    for place, name in enumerate(names):
        yield from attention.tasks(name, device, dtype)
        if place == 0:
            yield lambda name=name: iter([attention.skipping_task(device, dtype, CONTEXTS[name]), push_task(device)])
        if not name.startswith("pixels"):
            yield lambda name=name: pool_tasks(name, device, dtype)
            yield lambda name=name: iter([mask_task(name, device, dtype)])
            yield lambda name=name: loss_tasks(name, device, dtype)
