"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mcic.model import MCIC

STATE_NAMES = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq")}
"""what each optimizer keeps of a parameter"""


def build_optimizer(
    model: MCIC, *, kind: Literal["sgd", "adamw"] = "sgd", lr: float, new_layer_lr: float, momentum: float,
    weight_decay: float,
) -> torch.optim.SGD | torch.optim.AdamW:  # fmt: skip
    """An optimizer in which layers that start from scratch learn `new_layer_lr` times as fast as pretrained ones.

    Every group keeps its base rate as `initial_lr`; `set_lr` scales it. The update is fused, so that the device can
    skip it, and on a GPU the rate is a tensor there, so that a step can be recorded as a graph. What the optimizer
    keeps of each parameter begins at 0.

    Args:
        model: the network with classification head and propagation.
        kind: `sgd`, with momentum, or `adamw` (Loshchilov and Hutter 2019), whose first average is the momentum's.
        lr, new_layer_lr: rate of the pretrained layers, and the others' over it.
        momentum: 0…1.
        weight_decay: of `sgd` an L2 penalty, of `adamw` decoupled.
    """
    trained = tuple(f"{name}." for name in model.trained)
    pretrained = [parameter for name, parameter in model.named_parameters() if name.startswith(trained)]
    known = set(map(id, pretrained))
    averaged = set(map(id, model.ema.parameters())) if model.ema is not None else set()
    new = [p for p in model.parameters() if id(p) not in known | averaged]
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "lr": rate, "initial_lr": rate}
        for parameters, rate in ((pretrained, lr), (new, lr * new_layer_lr))
    ]
    groups = [group for group in groups if group["params"]]
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    for group in groups if on_gpu else ():
        group["lr"] = torch.tensor(group["lr"], device=device)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(
            groups, betas=(momentum, 0.999), weight_decay=weight_decay, fused=True, capturable=on_gpu
        )
    else:
        optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    for parameter in (p for group in groups for p in group["params"] if momentum or kind == "adamw"):
        for name in STATE_NAMES[type(optimizer)]:
            zero = torch.zeros((), device=device) if name == "step" else torch.zeros_like(parameter)
            optimizer.state[parameter][name] = zero
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
