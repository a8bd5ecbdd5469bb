"""VGG16 as in DeepLab (Simonyan & Zisserman 2015; Chen et al., "LargeFOV"): poolings are 3×3, the last two of
stride 1, and conv5 has dilation 2. The fully connected layers belong to the heads. As in DeepLab-v2, no average pooling
follows pool5, which DeepLab-v1 has."""

from __future__ import annotations

from torch import Tensor, nn

from mcic.model.backbones.base import Backbone, check_output_stride, plan_stages
from mcic.model.backbones.layers import conv

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG16(Backbone):
    """Features after pool5, D = 512. Parameters are named as in torchvision: `features.N.weight`, `features.N.bias`."""

    surplus = ("classifier.",)

    def __init__(self, *, output_stride: int) -> None:
        super().__init__(channels=512, output_stride=output_stride)
        pools = plan_stages([2] * len(_STAGES), output_stride)
        layers: list[nn.Module] = []
        in_channels, dilation = 3, 1
        for (channels, convs), pool in zip(_STAGES, pools, strict=True):
            for _ in range(convs):
                layers += [conv(in_channels, channels, 3, dilation=dilation, bias=True), nn.ReLU(inplace=True)]
                in_channels = channels
            # A dense pooling keeps its 3×3 window, undilated, as DeepLab trained it.
            layers.append(nn.MaxPool2d(3, stride=pool.stride, padding=1))
            dilation = pool.dilation
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def vgg16(*, output_stride: int | None = None) -> VGG16:
    """VGG16 of stride 8 (default), 16 or 32."""
    return VGG16(output_stride=check_output_stride("vgg16", output_stride, choices=(8, 16, 32)))
