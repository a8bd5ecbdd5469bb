"""Every kernel once, forward and backward, at small odd sizes: what compute-sanitizer watches."""

from __future__ import annotations

import sys

import torch
from mcic.kernels import class_pool, pseudo_masks, ring_push_, segmentation_losses, sparse_attention
from torch import Tensor

BATCH, CLASSES, SIDE = 3, 5, 7


def class_mask(device: torch.device) -> Tensor:
    """Background and the classes b + 1 … of image b; the last image reads background alone."""
    mask = torch.tril(torch.ones(BATCH, CLASSES, dtype=torch.bool)).flip(0)
    return mask.to(device)


def attention(device: torch.device, dtype: torch.dtype, *, channels: int, slots: int, query_gradient: bool) -> None:
    """Partly filled classes, θ 0 and 1."""
    make = {"device": device, "dtype": dtype}
    query = torch.randn(BATCH, SIDE**2, channels, requires_grad=query_gradient, **make)
    keys, values = (torch.randn(CLASSES, slots, channels, requires_grad=True, **make) for _ in range(2))
    bias = torch.randn(CLASSES, slots, requires_grad=True, **make)
    counts = torch.tensor([slots, slots // 2, 1, 0, slots], dtype=torch.int32, device=device)
    for threshold in (0.0, 1.0):
        message, entropy = sparse_attention(
            query, keys, values, bias, counts, class_mask(device), scale=channels**-0.5, threshold=threshold
        )
        (message.float().sum() + entropy.sum()).backward()


def maps(device: torch.device, dtype: torch.dtype) -> None:
    """Pooling, masks and losses."""
    features = torch.randn(BATCH, 20, SIDE, SIDE, device=device, dtype=dtype, requires_grad=True)
    logits = torch.randn(BATCH, CLASSES, SIDE, SIDE, device=device, dtype=dtype)
    mask = class_mask(device)
    for rule in ("paper", "authors"):
        confidence = logits.float().softmax(1) if rule == "paper" else logits.float()
        contexts, _, _ = class_pool(features, confidence, mask, threshold=0.2, rule=rule)
        contexts.sum().backward()
    masks = pseudo_masks(
        logits[:, 1:], mask[:, 1:], torch.rand(BATCH, SIDE, SIDE, device=device), logits=logits, threshold=0.1
    )
    both = [logits.clone().requires_grad_() for _ in range(2)]
    segmentation_losses(*both, masks).sum().backward()


def push(device: torch.device) -> None:
    """More rows of a class than it has slots, skipped rows, an empty push."""
    bank = torch.randn(CLASSES, 4, 19, device=device)
    ids = torch.full((CLASSES, 4), -1, device=device)
    counts, cursor = torch.zeros(2, CLASSES, dtype=torch.int32, device=device)
    for rows in (11, 0, 3):
        labels = (torch.arange(rows, device=device) % 3 - 1).to(torch.int32)
        ring_push_(bank, ids, counts, cursor, torch.randn(rows, 19, device=device), labels, labels.long())


def main() -> int:
    """On the GPU; 1 without one."""
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    exercise(torch.device("cuda"), (torch.bfloat16, torch.float32))
    torch.cuda.synchronize()
    print("every kernel ran")
    return 0


def exercise(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """Call everything."""
    torch.manual_seed(0)
    for dtype in dtypes:
        for slots in (6, 400, 600):  # one, both, and the other regime of the attention's kernels
            for query_gradient in (False, True):
                attention(device, dtype, channels=40, slots=slots, query_gradient=query_gradient)
        maps(device, dtype)
    push(device)


if __name__ == "__main__":
    sys.exit(main())
