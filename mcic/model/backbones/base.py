"""What a backbone is, and how a classification network becomes a dense one.

Every convolution and pooling pads symmetrically, so feature (i, j) is centred on image pixel (i·stride, j·stride)
whatever the image's size, and a side of n pixels gives ceil(n / stride) features (321 gives 41 at stride 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


class Backbone(nn.Module):
    """Images to features.

    Attributes:
        channels: D, channels of the features.
        output_stride: image pixels per feature pixel.
        pretrained: its weights come from a file, so its parameters learn at the small rate.
        fully_connected: of the same file, what a head's layers fc6 and fc7 begin with, see `weights.fully_connected`.
        surplus: prefixes of the names that its usual weight files hold and the features have no use for (classifiers).
    """

    surplus: tuple[str, ...] = ()

    def __init__(self, *, channels: int, output_stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.output_stride = output_stride
        self.pretrained = False
        self.fully_connected: tuple[tuple[Tensor, Tensor], ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D, ceil(H / stride), ceil(W / stride)] of images [B, 3, H, W] of any size.

        The images are RGB minus ImageNet's mean, divided by its standard deviation. Feature (i, j) is centred on pixel
        (i·stride, j·stride), so that grids fit crops of a multiple of the stride plus 1: padding is symmetric.
        Differentiable; the features have the arithmetic's dtype (bf16 under bf16 autocast).
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Stage:
    """How one stage of a network runs at a given output stride.

    Attributes:
        stride: of the stage's first layer.
        entry_dilation: of that layer's kernel; it still sees the grid of the stage before.
        dilation: of the layers after it.
    """

    stride: int
    entry_dilation: int
    dilation: int


def plan_stages(strides: Sequence[int], output_stride: int) -> list[Stage]:
    """Stages whose strides beyond `output_stride` are replaced by dilation ("à trous": Chen et al., DeepLab).

    The dense network computes what the strided one would, at more places: subsampled, its features are the same.
    """
    stages, reached, dilation = [], 1, 1
    for stride in strides:
        keeps = reached * stride <= output_stride
        entry_dilation = dilation
        if keeps:
            reached *= stride
        else:
            dilation *= stride
        stages.append(Stage(stride if keeps else 1, entry_dilation, dilation))
    return stages


def check_output_stride(backbone: str, value: int | None, *, choices: Sequence[int]) -> int:
    """`value`, or the first of `choices` when None; ValueError where the backbone has no such stride."""
    if value is None:
        return choices[0]
    if value not in choices:
        possible = ", ".join(map(str, choices))
        raise ValueError(f"--model.output-stride of {backbone} must be one of {possible}, got {value}")
    return value
