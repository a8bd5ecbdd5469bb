"""Every use of the Triton kernels that is compiled ahead of time and tuned: the operations at the sizes of real runs.

On the CPU the tensors are not filled: `bench.aot` computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

NUM_IMAGES = {"cpu": 2, "cuda": 16}
"""B; where nothing is computed, few are enough"""

Run = Callable[[torch.dtype, torch.device], None]


@dataclass(frozen=True)
class Case:
    """One use of an operation.

    Attributes:
        name: starts with the operation's; the sizes that differ from C1 follow.
        run: computes it once in a dtype on a device.
        shipped: compiled by default.
    """

    name: str
    run: Run
    shipped: bool = False


def maps(dtype: torch.dtype, device: torch.device, *shape: int, channels_last: bool = True) -> Tensor:
    """Random [B, C, H, W]; not filled on the CPU, where nothing is computed."""
    tensor = values(dtype, device, NUM_IMAGES[device.type], *shape)
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def values(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Random numbers; not filled on the CPU."""
    fill = torch.randn if device.type == "cuda" else torch.empty
    return fill(shape, dtype=dtype, device=device)


def image_classes(device: torch.device, num_classes: int, own: int) -> Tensor:
    """bool [B, K]: background and own - 1 objects."""
    mask = torch.zeros(NUM_IMAGES[device.type], num_classes, dtype=torch.bool, device=device)
    mask[:, :own] = True
    return mask


def differentiate(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Run the backward pass with some gradient of every output."""
    outputs = tuple(output for output in outputs if output.requires_grad)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def attention(
    dtype: torch.dtype, device: torch.device, *, D: int = 1024, E: int | None = None, K: int = 21, S: int = 64,
    side: int = 41, heads: int | None = None, threshold: float = 0.0, bias: bool = True, query_grad: bool = False,
    bank: torch.dtype | None = None,
) -> None:  # fmt: skip
    """`sparse_attention` forward and backward; three classes an image."""
    from mcic.kernels.sparse_attention.triton import sparse_attention

    lead = () if heads is None else (heads,)
    query = values(dtype, device, NUM_IMAGES[device.type], side * side, D)
    keys, messages = (values(bank or dtype, device, *lead, K, S, width) for width in (D, E or D))
    key_bias = values(torch.float32, device, *lead, K, S) if bias else None
    wanted = (keys, messages, *([key_bias] if bias else []), *([query] if query_grad else []))
    for tensor in wanted:
        tensor.requires_grad_()
    counts = torch.full((K,), S, dtype=torch.int32, device=device)
    outputs = sparse_attention(
        query, keys, messages, key_bias, counts, image_classes(device, K, 3), scale=D**-0.5, threshold=threshold
    )
    differentiate(outputs, wanted)


def pool(
    dtype: torch.dtype, device: torch.device, *, rule: str = "paper", D: int = 1024, K: int = 21, side: int = 41,
    channels_last: bool = True, confidence: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """`class_pool` forward and backward."""
    from mcic.kernels.class_pool.triton import class_pool

    features = maps(dtype, device, D, side, side, channels_last=channels_last).requires_grad_()
    scores = maps(confidence, device, K, side, side, channels_last=channels_last)
    outputs = class_pool(features, scores, image_classes(device, K, 3), threshold=0.5, rule=rule)
    differentiate(outputs[:1], (features,))


def pseudo_masks(
    dtype: torch.dtype, device: torch.device, *, rule: str = "paper", K: int = 21, side: int = 41,
    saliency: bool = True, second: str | None = "logits", channels_last: bool = True,
) -> None:  # fmt: skip
    """`pseudo_masks`, with the context mask from `second`: logits, context_heatmap or None."""
    from mcic.kernels.pseudo_masks.triton import pseudo_masks

    sources = {"logits": None, "context_heatmap": None}
    if second is not None:
        rows = K if second == "logits" else K - 1
        sources[second] = maps(dtype, device, rows, side, side, channels_last=channels_last)
    tags = image_classes(device, K, 3)[:, 1:]
    pseudo_masks(
        maps(dtype, device, K - 1, side, side, channels_last=channels_last),
        tags,
        values(torch.float32, device, NUM_IMAGES[device.type], side, side) if saliency else None,
        torch.ones(NUM_IMAGES[device.type], side, side, dtype=torch.bool, device=device),
        **sources,
        threshold=0.1,
        cam_background=rule,
        background_power=1.0,
        context_background=rule,
        saliency_weight=0.5,
        merge_rule=rule,
    )


def losses(
    dtype: torch.dtype, device: torch.device, *, K: int = 21, side: int = 41, context: bool = True, masks: int = 3,
    channels_last: bool = True,
) -> None:  # fmt: skip
    """`segmentation_losses` forward and backward."""
    from mcic.kernels.segmentation_losses.triton import segmentation_losses

    logits = [maps(dtype, device, K, side, side, channels_last=channels_last) for _ in range(1 + context)]
    for tensor in logits:
        tensor.requires_grad_()
    labels = torch.zeros(masks, NUM_IMAGES[device.type], side, side, dtype=torch.uint8, device=device)
    output = segmentation_losses(logits[0], logits[1] if context else None, labels, None)
    differentiate((output,), tuple(logits))


CASES = [
    Case("sparse_attention", attention, shipped=True),
    Case("sparse_attention θ=1", partial(attention, threshold=1.0), shipped=True),
    Case("sparse_attention D=512", partial(attention, D=512), shipped=True),
    Case("sparse_attention D=2048", partial(attention, D=2048), shipped=True),
    Case("sparse_attention 81×4096 D=512", partial(attention, K=81, S=4096, D=512, side=53)),
    Case(
        "sparse_attention 81×4096 D=512 θ=1 dq",
        partial(attention, K=81, S=4096, D=512, side=53, threshold=1.0, query_grad=True),
        shipped=True,
    ),
    Case("sparse_attention dq", partial(attention, query_grad=True), shipped=True),
    Case("sparse_attention no bias", partial(attention, bias=False)),
    Case("sparse_attention 2 heads θ=1 dq", partial(attention, heads=2, threshold=1.0, query_grad=True)),
    Case("sparse_attention D=16", partial(attention, D=16, query_grad=True)),
    Case("sparse_attention D=77 E=130", partial(attention, D=77, E=130, query_grad=True)),
    Case("sparse_attention fp32 bank θ=1 dq", partial(attention, bank=torch.float32, threshold=1.0, query_grad=True)),
    Case("sparse_attention D=2048 θ=1 dq", partial(attention, D=2048, threshold=1.0, query_grad=True)),
    Case("sparse_attention 21×4096", partial(attention, S=4096, query_grad=True)),
    Case("sparse_attention 21×4096 D=2048", partial(attention, S=4096, D=2048, query_grad=True)),
    Case("sparse_attention 21×4096 D=77", partial(attention, S=4096, D=77, E=130, threshold=1.0, query_grad=True)),
    Case("class_pool", pool, shipped=True),
    Case("class_pool D=512", partial(pool, D=512), shipped=True),
    Case("class_pool authors", partial(pool, rule="authors"), shipped=True),
    Case("class_pool NCHW", partial(pool, channels_last=False)),
    Case("class_pool D=2048 K=81", partial(pool, D=2048, K=81)),
    Case("class_pool D=77", partial(pool, D=77)),
    Case("class_pool D=16 NCHW authors", partial(pool, D=16, rule="authors", channels_last=False)),
    Case("class_pool bf16 confidence", partial(pool, confidence=torch.bfloat16)),
    Case("pseudo_masks", pseudo_masks, shipped=True),
    Case("pseudo_masks authors", partial(pseudo_masks, rule="authors"), shipped=True),
    Case("pseudo_masks heatmaps", partial(pseudo_masks, second="context_heatmap"), shipped=True),
    Case("pseudo_masks CAM alone, no saliency, NCHW", partial(pseudo_masks, second=None, saliency=False,
                                                             channels_last=False)),
    Case("pseudo_masks K=81 321²", partial(pseudo_masks, K=81, side=321), shipped=True),
    Case("segmentation_losses", losses, shipped=True),
    Case("segmentation_losses K=81", partial(losses, K=81)),
    Case("segmentation_losses one map, one mask, NCHW", partial(losses, context=False, masks=1, channels_last=False)),
]  # fmt: skip
"""what is compiled"""
