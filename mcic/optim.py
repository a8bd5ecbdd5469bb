"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from mcic.model import MCIC


def build_optimizer(
    model: MCIC, *, lr: float, new_layer_lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD in which layers that start from scratch learn `new_layer_lr` times as fast as pretrained ones.

    Every group keeps its base rate as `initial_lr`; `set_lr` scales it. The update is fused, so that the device can
    skip it, and on a GPU the rate is a tensor there, so that a step can be recorded as a graph. Momentum begins at 0.
    """
    pretrained = list(model.network.backbone.parameters()) if model.network.backbone.pretrained else []
    known = set(map(id, pretrained))
    averaged = set(map(id, model.ema.parameters())) if model.ema is not None else set()
    new = [p for p in model.parameters() if id(p) not in known | averaged]
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "lr": rate, "initial_lr": rate}
        for parameters, rate in ((pretrained, lr), (new, lr * new_layer_lr))
    ]
    groups = [group for group in groups if group["params"]]
    device = groups[0]["params"][0].device
    for group in groups if device.type == "cuda" else ():
        group["lr"] = torch.tensor(group["lr"], device=device)
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    for parameter in (p for group in groups for p in group["params"] if momentum):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's base rate."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Norm over all gradients, a scalar on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
