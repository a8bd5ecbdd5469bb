"""Layers the backbones share: a batch norm that no longer learns, and the initial scale of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcic import distributed


class FrozenBatchNorm2d(nn.Module):
    """A batch norm in evaluation for good: per channel `y = weight · (x - mean) / √(var + ε) + bias`, all buffers.

    It takes the names of `nn.BatchNorm2d` and starts as the identity. `conv_norm` applies it.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.full((channels,), (1 + eps) ** 0.5))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """f32 [C] each, with `y = scale · x + shift`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks: several processes compute what one would with the same batch."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same, normalised per channel."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        count = x.numel() / x.shape[1] * distributed.world_size()
        local = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = distributed.sum_with_gradient(local.sum((0, 2, 3))) / count
        centered = local - mean[:, None, None]
        var = distributed.sum_with_gradient(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def normalises_alone(module: nn.Module) -> bool:
    """Whether a layer takes its statistics from the batch of its own process."""
    shared = isinstance(module, (BatchNorm2d, nn.SyncBatchNorm))
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and not shared


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
    """`norm(conv(x))` as one convolution; the gradient reaches `x` and `conv.weight`.

    The scale goes into the kernel in fp32, before autocast rounds it: no pass over the activations, and no
    activation stored for one.
    """
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    bias: bool = False, activation: str = "relu",
) -> nn.Conv2d:  # fmt: skip
    """A convolution padded to keep its centre, with weights that keep the size of what passes through it.

    Args:
        activation: what follows, relu | linear; ReLU halves the power, so the weights before it are √2 larger
            (He et al. 2015). Bias starts at 0.
    """
    padding = dilation * (kernel_size - 1) // 2
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity=activation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
