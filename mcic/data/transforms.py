"""Random scale, crop, flip and colour, the same for an image, its saliency map and its mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from mcic.data.base import IGNORE
from mcic.data.images import normalize

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


@dataclass(frozen=True, slots=True)
class Sample:
    """One augmented image of side S.

    Attributes:
        image: f32 [3, S, S], normalised; 0, the mean colour, in the padding.
        saliency: f32 [S, S] in 0…1, or None; 1 in the padding, where the authors' rule reads "salient".
        mask: uint8 [S, S]; 255 in the padding, and everywhere where there is none.
        confidence: f32 [S, S] of the mask, 0 in the padding, or None.
        valid: bool [S, S], False in the padding.
    """

    image: Tensor
    saliency: Tensor | None
    mask: Tensor
    confidence: Tensor | None
    valid: Tensor


@dataclass(frozen=True, slots=True)
class _Window:
    """One axis of a crop: `length` crop pixels from `offset` on show the image from `start` to `stop`."""

    offset: int
    length: int
    start: float
    stop: float

    @property
    def crop(self) -> slice:
        return slice(self.offset, self.offset + self.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """The joint random transform; calling it is a pure function of the image and (seed, epoch, index).

    Attributes:
        size: side of the square crop, pixels.
        scale: range of the random factor on both sides of the image.
        flip: mirror half of the images.
        color_jitter: brightness, contrast and saturation are each scaled by up to 1 ± this; 0 is off.
    """

    size: int
    scale: tuple[float, float]
    flip: bool
    color_jitter: float
    seed: int

    def __call__(
        self, image: np.ndarray, saliency: np.ndarray | None, mask: np.ndarray | None,
        confidence: np.ndarray | None = None, *, epoch: int, index: int,
    ) -> Sample:  # fmt: skip
        """Transform uint8 [H, W, 3], f32 [H, W] or None, uint8 [H, W] or None, and f32 [H, W] or None."""
        random = np.random.default_rng([self.seed, epoch, index])
        factor = random.uniform(*self.scale)
        rows = _window(image.shape[0], factor, self.size, random)
        columns = _window(image.shape[1], factor, self.size, random)
        mirrored = self.flip and random.random() < 0.5

        def placed(source: np.ndarray, fill: float, how: Image.Resampling) -> Tensor:
            canvas = np.full((self.size, self.size), fill, source.dtype)
            canvas[rows.crop, columns.crop] = np.asarray(_resized(source, rows, columns, how))
            return _tensor(canvas, mirrored)

        valid = np.zeros((self.size, self.size), bool)
        valid[rows.crop, columns.crop] = True
        ignored = torch.full((self.size, self.size), IGNORE, dtype=torch.uint8)
        return Sample(
            image=self._image(_resized(image, rows, columns, BILINEAR), rows, columns, mirrored, random),
            saliency=None if saliency is None else placed(saliency, 1.0, BILINEAR),
            mask=ignored if mask is None else placed(mask, IGNORE, NEAREST),
            confidence=None if confidence is None else placed(confidence, 0.0, BILINEAR),
            valid=_tensor(valid, mirrored),
        )

    def _image(
        self, pixels: Image.Image, rows: _Window, columns: _Window, mirrored: bool, random: np.random.Generator
    ) -> Tensor:
        if self.color_jitter > 0:
            pixels = _jittered(pixels, self.color_jitter, random)
        canvas = torch.zeros(3, self.size, self.size)
        canvas[:, rows.crop, columns.crop] = normalize(np.asarray(pixels))
        return canvas.flip(2) if mirrored else canvas


def fitted(array: np.ndarray, long_side: int, how: Image.Resampling) -> np.ndarray:
    """[H, W] or uint8 [H, W, 3] with its longer side brought to `long_side` pixels; 0: as it is."""
    height, width = array.shape[:2]
    if long_side in (0, max(height, width)):
        return array
    factor = long_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.array(Image.fromarray(array).resize(size, how))


def _window(length: int, factor: float, size: int, random: np.random.Generator) -> _Window:
    """A random crop of `size` along an axis of `length` pixels that is scaled by `factor`; pads where it is short."""
    scaled = max(1, round(length * factor))
    shift = int(random.integers(0, abs(scaled - size) + 1))
    if scaled <= size:
        return _Window(shift, scaled, 0.0, float(length))
    step = length / scaled
    return _Window(0, size, shift * step, min((shift + size) * step, float(length)))


def _resized(source: np.ndarray, rows: _Window, columns: _Window, how: Image.Resampling) -> Image.Image:
    """Only the pixels that the crop shows are computed, with antialiasing where bilinear."""
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return Image.fromarray(source).resize((columns.length, rows.length), how, box=box)


def _jittered(pixels: Image.Image, strength: float, random: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        pixels = enhance(pixels).enhance(max(0.0, random.uniform(1 - strength, 1 + strength)))
    return pixels


def _tensor(array: np.ndarray, mirrored: bool) -> Tensor:
    return torch.from_numpy(array[:, ::-1].copy() if mirrored else array)
