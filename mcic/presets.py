"""Named configurations: a data set and a network with the settings that suit them. The docstring is the help text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mcic.config import Config, DataConfig, EvalConfig, MethodConfig, ModelConfig, TrainConfig
from mcic.suggest import nearest

DEFAULT = "shapes"


def preset(name: str) -> Config:
    """A fresh copy of the configuration called `name`; raises ValueError, with the nearest name, if there is none."""
    if name not in PRESETS:
        raise ValueError(f"the preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]()


def _shapes() -> Config:
    """procedural shapes on textured ground, made at run time: minutes on a CPU, nothing to download"""
    return Config(
        preset="shapes",
        data=DataConfig(name="shapes", saliency="auto"),
        model=ModelConfig(backbone="tiny", weights="none", segmentation_head="linear"),
        # The saliency of these cluttered images is coarse, so a CAM mask should decide only where it is sure, T_a 0.5;
        # and with contexts this alike, an entropy term only drives all pixels to one entry.
        method=MethodConfig(slots=32, cam_threshold=0.5, background_power=1.5, entropy_weight=0.0, ramp_epochs=12.0),
        train=TrainConfig(
            epochs=24, batch_size=16, lr=0.1, new_layer_lr=1.0, warmup_steps=50, size=97, scale=(0.85, 1.2)
        ),
    )


def _voc12_vgg16() -> Config:
    """PASCAL VOC 2012 with VGG16, large field of view"""
    return _paper("voc12-vgg16", "voc12", "vgg16", head="lfov", size=321)


def _voc12_resnet101() -> Config:
    """PASCAL VOC 2012 with ResNet-101, ASPP"""
    return _paper("voc12-resnet101", "voc12", "resnet101", head="aspp", size=321)


def _coco14_vgg16() -> Config:
    """COCO 2014 with VGG16, large field of view"""
    return _paper("coco14-vgg16", "coco14", "vgg16", head="lfov", size=417)


def _coco14_resnet101() -> Config:
    """COCO 2014 with ResNet-101, ASPP"""
    return _paper("coco14-resnet101", "coco14", "resnet101", head="aspp", size=417)


def _folder() -> Config:
    """your own photographs and tags, with EfficientNet-Lite0: works on a CPU"""
    return Config(
        preset="folder",
        data=DataConfig(name="folder", long_side=None),
        model=ModelConfig(backbone="efficientnet_lite0", weights="imagenet", segmentation_head="linear"),
        # Chosen on held-out scenes of photographs: docs/results.md.
        method=MethodConfig(mask_upsampling=4, refinement="pamr", message_gain=0.1),
        train=TrainConfig(
            epochs=None,
            batch_size=None,
            optimizer="adamw",
            lr=3e-4,
            new_layer_lr=3.0,
            weight_decay=0.01,
            warmup_steps=20,
            size=None,
            scale=(0.75, 1.25),
            color_jitter=0.5,
            precision=None,
        ),
    )


def _paper(
    name: str,
    data: Literal["voc12", "coco14"],
    backbone: Literal["vgg16", "resnet101"],
    *,
    head: Literal["lfov", "aspp"],
    size: int,
) -> Config:
    """The paper's settings, which are the defaults of the fields."""
    return Config(
        preset=name,
        data=DataConfig(name=data),
        model=ModelConfig(backbone=backbone, weights="imagenet", segmentation_head=head),
        train=TrainConfig(size=size),
        eval=EvalConfig(protocol="voc"),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "shapes": _shapes,
    "voc12-vgg16": _voc12_vgg16,
    "voc12-resnet101": _voc12_resnet101,
    "coco14-vgg16": _coco14_vgg16,
    "coco14-resnet101": _coco14_resnet101,
    "folder": _folder,
}
