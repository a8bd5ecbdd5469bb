"""Segmentation and classification heads: convolutions from features [B, D, h, w] to class scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SumOfBranches(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLab-v2: branches of several dilations, their scores added."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, h, w] → [B, K, h, w]."""
        return sum(branch(features) for branch in self.branches)


def segmentation_head(
    kind: str, channels: int, num_classes: int, *, output_stride: int, hidden: int | None
) -> nn.Module:
    """A DeepLab segmentation head.

    Args:
        kind: `linear`: one 1×1 convolution; `lfov`: one branch of dilation 12; `aspp`: dilations 6, 12, 18, 24 summed
            (both given for stride 8 and scaled to `output_stride`).
        channels: D.
        num_classes: K.
        output_stride: image pixels per feature pixel.
        hidden: width of fc6 and fc7 of each branch (VGG16: 1024); None: the dilated convolution gives the scores.
    """
    if kind == "linear":
        return nn.Conv2d(channels, num_classes, 1)
    rates = (12,) if kind == "lfov" else (6, 12, 18, 24)
    branches = [_branch(channels, num_classes, max(1, rate * 8 // output_stride), hidden) for rate in rates]
    return branches[0] if len(branches) == 1 else SumOfBranches(branches)


def classification_head(kind: str, channels: int, num_objects: int, *, hidden: int | None) -> nn.Module:
    """`linear`: a 1×1 convolution; `deep`: fc6–fc8 as convolutions of dilation 1, or one 3×3 where hidden is None."""
    return nn.Conv2d(channels, num_objects, 1) if kind == "linear" else _branch(channels, num_objects, 1, hidden)


def initialize_head(head: nn.Module, fully_connected: Sequence[tuple[Tensor, Tensor]] = ()) -> list[str]:
    """Normal weights of deviation 1/√fan-in, at least DeepLab's 0.01, and zero biases; hidden layers by Kaiming's rule,
    or with the weights and biases `fully_connected` of fc6 and fc7, where they are given.

    On a backbone that starts from scratch, the head's weights are all that carries the gradient to it: with 0.01
    everywhere the first epochs would learn nothing.

    Returns:
        Names of the layers that took given weights.
    """
    for layer in (module for module in head.modules() if isinstance(module, nn.Conv2d)):
        if layer.out_channels >= 256:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=max(0.01, layer.weight[0].numel() ** -0.5))
        nn.init.zeros_(layer.bias)
    taken = []
    for name, layer in head.named_modules():
        for given, (weight, bias) in enumerate(fully_connected):
            # fc6 and fc7 are the places 0 and 3 of a branch.
            if name.rpartition(".")[2] == str(3 * given) and getattr(layer, "weight", bias).shape == weight.shape:
                layer.weight.data.copy_(weight)
                layer.bias.data.copy_(bias)
                taken.append(name)
    return taken


def _branch(channels: int, num_classes: int, dilation: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return nn.Conv2d(channels, num_classes, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(hidden, hidden, 1), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(hidden, num_classes, 1),
    )  # fmt: skip
