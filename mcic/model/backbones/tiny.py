"""A small network for small images, trained from scratch in minutes on two CPU cores (data set `shapes`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mcic.model.backbones.base import Backbone, check_output_stride, plan_stages
from mcic.model.backbones.layers import BatchNorm2d, conv


class DilatedBlock(nn.Module):
    """`x + ReLU(norm(conv(x)))`, one dilated 3×3 convolution; the shape stays."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, dilation=dilation)
        self.norm = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)), inplace=True)


class Tiny(Backbone):
    """Three strided convolutions at most, then dilated residual blocks.

    Batch norm, not group norm: the classification loss averages over all pixels (E1), and normalising each image by
    itself takes out most of what that mean could say.

    Args:
        width: D, even.
        dilations: one block each, in pixels of the stride-4 grid. The receptive field is 7 + 8·Σ dilations
            image pixels: 103 by default, all of a 96×96 image.
        output_stride: 4 or 8.
    """

    def __init__(self, *, width: int = 64, dilations: Sequence[int] = (1, 2, 4, 1, 4), output_stride: int = 4) -> None:
        super().__init__(channels=width, output_stride=output_stride)
        down = []
        in_channels = 3
        for stage, channels in zip(plan_stages((2, 2, 2), output_stride), (width // 2, width, width), strict=True):
            if stage.stride > 1:
                down += [
                    conv(in_channels, channels, 3, stride=2),
                    BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = channels
        self.stem = nn.Sequential(*down)
        step = output_stride // 4
        self.blocks = nn.Sequential(*(DilatedBlock(width, max(1, dilation // step)) for dilation in dilations))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))


def tiny(*, output_stride: int | None = None) -> Tiny:
    """The network of the preset `shapes`: 64 channels, stride 4 (default) or 8."""
    return Tiny(output_stride=check_output_stride("tiny", output_stride, choices=(4, 8)))
