"""Feature extractors: `build_backbone(name)` is the door; only the module of the chosen one is imported."""

from __future__ import annotations

import importlib

from mcic.model.backbones.base import Backbone
from mcic.model.backbones.weights import fully_connected, load_state_dict, load_weights
from mcic.suggest import nearest

__all__ = ["Backbone", "build_backbone", "hidden_width", "load_state_dict"]

_MODULES = {
    "tiny": "tiny",
    "vgg16": "vgg",
    "resnet50": "resnet",
    "resnet101": "resnet",
    "efficientnet_lite0": "efficientnet",
}


def hidden_width(name: str) -> int | None:
    """Width of the layers fc6 and fc7 in front of a head's scores: VGG16 has them."""
    return 1024 if name == "vgg16" else None


def build_backbone(name: str, *, weights: str = "none", output_stride: int | None = None) -> Backbone:
    """The backbone `name`, with weights.

    Args:
        name: tiny | vgg16 | resnet50 | resnet101 | efficientnet_lite0.
        weights: none (random) | imagenet | path of a .pth, .pt or .safetensors file; see `weights.py`.
        output_stride: image pixels per feature pixel; None: the backbone's own.

    Raises:
        ValueError: no such backbone, an output stride it does not have, or weights that cannot be had or do not fit.
    """
    if name not in _MODULES:
        known = ", ".join(_MODULES)
        raise ValueError(f"--model.backbone must be one of {known}, got {name!r}{nearest(name, _MODULES)}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    backbone: Backbone = getattr(module, name)(output_stride=output_stride)
    if weights != "none":
        state = load_state_dict(weights, name)
        load_weights(backbone, state, source=weights)
        backbone.pretrained = True
        if (hidden := hidden_width(name)) is not None:
            backbone.fully_connected = fully_connected(state, channels=backbone.channels, hidden=hidden)
    return backbone
