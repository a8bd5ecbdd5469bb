"""ResNet-50 and ResNet-101 (He et al. 2016, torchvision's layout: the stride is in the 3×3 convolution), dilated as
in DeepLab-v2, with frozen batch norm: the batches of segmentation are too small to estimate its statistics."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mcic.model.backbones.base import Backbone, Stage, check_output_stride, plan_stages
from mcic.model.backbones.layers import FrozenBatchNorm2d, conv, conv_norm

_EXPANSION = 4
_STRIDES = (8, 16, 32)
# With frozen norms nothing shrinks the sum of the branches: at full size each block would double its power, 33 of
# them overflow fp16. At a fifth, 33 blocks grow it about 1.04³³ = 3.6 times.
_BRANCH_SCALE = 0.2


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions beside a shortcut: [B, C, h, w] to [B, 4·width, h/stride, w/stride]."""

    def __init__(self, in_channels: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilation)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = FrozenBatchNorm2d(out_channels)
        self.bn3.weight.mul_(_BRANCH_SCALE)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv(in_channels, out_channels, 1, stride=stride, activation="linear")
            self.downsample = nn.Sequential(shortcut, FrozenBatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        branch = F.relu(conv_norm(branch, self.conv2, self.bn2), inplace=True)
        branch = conv_norm(branch, self.conv3, self.bn3)
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        return F.relu(branch.add_(shortcut), inplace=True)


class ResNet(Backbone):
    """Features after layer4, D = 2048. Parameters and buffers are named as in torchvision."""

    surplus = ("fc.", "layer5.")

    def __init__(self, blocks: tuple[int, int, int, int], *, output_stride: int) -> None:
        super().__init__(channels=2048, output_stride=output_stride)
        self.conv1 = conv(3, 64, 7, stride=2)
        self.bn1 = FrozenBatchNorm2d(64)
        # The first two strides are the stem's: convolution and pooling.
        stages = plan_stages((2, 2, 1, 2, 2, 2), output_stride)[2:]
        in_channels = 64
        for index, (count, stage) in enumerate(zip(blocks, stages, strict=True)):
            width = 64 * 2**index
            self.add_module(f"layer{index + 1}", _layer(in_channels, width, count, stage))
            in_channels = _EXPANSION * width

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(conv_norm(images, self.conv1, self.bn1), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _layer(in_channels: int, width: int, count: int, stage: Stage) -> nn.Sequential:
    entry = Bottleneck(in_channels, width, stride=stage.stride, dilation=stage.entry_dilation)
    rest = (Bottleneck(_EXPANSION * width, width, stride=1, dilation=stage.dilation) for _ in range(count - 1))
    return nn.Sequential(entry, *rest)


def resnet50(*, output_stride: int | None = None) -> ResNet:
    """ResNet-50 of stride 8 (default), 16 or 32."""
    return ResNet((3, 4, 6, 3), output_stride=check_output_stride("resnet50", output_stride, choices=_STRIDES))


def resnet101(*, output_stride: int | None = None) -> ResNet:
    """ResNet-101 of stride 8 (default), 16 or 32."""
    return ResNet((3, 4, 23, 3), output_stride=check_output_stride("resnet101", output_stride, choices=_STRIDES))
