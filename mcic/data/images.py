"""Image and mask files to arrays, and the normalisation that pretrained backbones expect."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcic.pictures import opened, orientation, upright

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LARGE, _LARGE_PIXELS = threading.Lock(), 2**24
"""images that decode to more are probed one at a time: a folder of bombs must not fill the memory"""

_GREY_16 = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_PACKED_GREY = {"L;2": 85, "L;4": 17}
"""PNGs of 2 and 4 bits a pixel, whose values Pillow spreads over 0…255 by these factors"""


def read_image(source: str | Path | BinaryIO) -> np.ndarray:
    """uint8 [H, W, 3] RGB, turned the way a person sees it (EXIF orientation).

    Grey, 1-bit and palette images take their displayed colour. Alpha is laid over white. 16-bit grey maps its full
    range 0…65535 to 0…255, unstretched (larger values of 32-bit files are cut off); of 16-bit colour Pillow keeps
    the high byte. CMYK and YCbCr are converted without their colour profile. Of an animation the first frame is read.

    Raises:
        ValueError: the file is missing, broken, of more than 178,956,970 pixels, or of floating-point values, whose
            range is nowhere stated.
    """
    with opened(source, "image") as image:
        return np.array(to_rgb(upright(image)))


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a file says of its image.

    Attributes:
        size: (H, W) in pixels, turned the way a person sees it.
        oddities: some of `animated` (or several pages), `transparent`, `CMYK`, `16-bit`, `rotated` (by EXIF), and
            `ending` (the file's ending is that of another format).
    """

    size: tuple[int, int]
    oddities: frozenset[str]


def probe_image(source: str | Path | BinaryIO) -> ImageFacts:
    """Read a file as `read_image` does, a JPEG at an eighth of its size: many times faster, and it fails the same.

    Raises:
        ValueError: as `read_image`.
    """
    with opened(source, "image") as image:
        full = image.size
        transparent = image.has_transparency_data
        odd = {
            "animated": getattr(image, "is_animated", False) and image.format != "MPO",  # a JPEG with a preview
            "CMYK": image.mode == "CMYK",
            "16-bit": image.mode in _GREY_16 or ";16" in _raw_mode(image),
            "ending": _is_misnamed(Path(str(source)), image.format),
        }
        image.draft("RGB", (1, 1))
        with _alone_if_large(image):
            shrunk, turned = image.size != full, orientation(image)
            image = upright(image)
            to_rgb(image)
            odd["rotated"] = turned > 1
            odd["transparent"] = transparent and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    width, height = image.size if not shrunk else full[::-1] if turned in range(5, 9) else full
    return ImageFacts((height, width), frozenset(name for name, is_so in odd.items() if is_so))


def read_thumbnail(source: str | Path | BinaryIO, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: what `read_image` gives, squeezed; a JPEG is not decoded at its full size.

    Raises:
        ValueError: as `read_image`.
    """
    with opened(source, "image") as image:
        image.draft("RGB", (4 * side, 4 * side))
        with _alone_if_large(image):
            return np.array(to_rgb(upright(image)).resize((side, side), Image.Resampling.BOX))


def _alone_if_large(image: Image.Image) -> AbstractContextManager[object]:
    """To be entered before anything decodes the image; of a PNG even the question for its EXIF does."""
    return _LARGE if image.width * image.height > _LARGE_PIXELS else nullcontext()


def _is_misnamed(path: Path, found: str | None) -> bool:
    named = Image.registered_extensions().get(path.suffix.lower())
    return named is not None and {named, found} not in ({named}, {"JPEG", "MPO"})


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save it with 8 or 16 bits")
    if image.mode in _GREY_16:
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def read_mask(source: str | Path | BinaryIO) -> np.ndarray:
    """uint8 [H, W] class indices of a palette or grey image; the palette's colours play no part.

    Raises:
        ValueError: the file is missing or broken, has colours instead of indices, or a value above 255.
    """
    with opened(source, "mask") as image:
        packed = _PACKED_GREY.get(_raw_mode(image), 1)
        image = upright(image)
        if image.mode not in ("P", "L", "1", *_GREY_16):
            raise ValueError(f"a mask holds one class index per pixel (a palette or grey PNG), this has {image.mode}")
        values = np.asarray(image)
        if values.size and values.max() > 255:
            raise ValueError(f"class indices go up to 255, this has {values.max()}")
        return values.astype(np.uint8) // packed


def _raw_mode(image: Image.Image) -> str:
    """How the file packs its pixels, e.g. "L;4"; "" where the format does not say."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else ""


def read_map(source: str | Path | BinaryIO) -> np.ndarray:
    """f32 [H, W] in 0…1 of a grey map of 8 or 16 bits, 1 at the top of the range; colours become their luminance.

    Raises:
        ValueError: the file is missing or broken.
    """
    with opened(source, "saliency map") as image:
        image = upright(image)
        if image.mode in _GREY_16:
            return (np.asarray(image).astype(np.float32) / 65535).clip(0, 1)
        return np.asarray(image.convert("L")).astype(np.float32) / 255


def normalize(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] → f32 [3, H, W] in 0…1, minus ImageNet's mean, divided by its standard deviation."""
    planes = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))
    return planes.sub_(_column(IMAGENET_MEAN, 255)).div_(_column(IMAGENET_STD, 255))


def denormalize(image: Tensor) -> np.ndarray:
    """The inverse of `normalize`: f32 [3, H, W] → uint8 [H, W, 3]."""
    planes = image.detach().cpu().float() * _column(IMAGENET_STD, 255) + _column(IMAGENET_MEAN, 255)
    return planes.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _column(values: tuple[float, ...], factor: float) -> Tensor:
    return torch.tensor(values)[:, None, None] * factor  # [3, 1, 1]
