"""What the network says of one image, and the pictures and figures that are made of it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mcic.durable import write_with
from mcic.fonts import font_for
from mcic.preview import overlay

OVERLAY_SIDE = 2048
"""longest side of an overlay, pixels, unless told otherwise"""

_BAND = 512  # rows counted at once: counting makes 16 bytes of every pixel
_LEGEND_PAPER, _LEGEND_INK = (250, 250, 248), (38, 38, 36)


@dataclass(frozen=True, slots=True)
class ClassArea:
    """What one class has of an image.

    Attributes:
        name: of the class, "background" for the ground.
        pixels: how many.
        percent: of the image, 0…100.
        mean_confidence: over these pixels, 0…1.
    """

    name: str
    pixels: int
    percent: float
    mean_confidence: float


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """A predicted mask.

    Attributes:
        mask: uint8 [H, W]; value i is `classes[i]`.
        confidence: f32 [H, W] in 0…1, the probability of the mask's class among the classes that were allowed.
        classes: the K names, "background" first.
        palette: uint8 [K, 3], RGB of every mask value.
        pixels: uint8 [H, W, 3], the image.
        probabilities: f32 [K, H, W], 0 for classes that were not allowed; None unless asked for.
    """

    mask: np.ndarray
    confidence: np.ndarray
    classes: tuple[str, ...]
    palette: np.ndarray
    pixels: np.ndarray
    probabilities: np.ndarray | None = None

    def areas(self) -> list[ClassArea]:
        """The classes that occur, by mask value."""
        counts, sums = np.zeros(len(self.classes), np.int64), np.zeros(len(self.classes))
        for top in range(0, len(self.mask), _BAND):
            values = self.mask[top : top + _BAND].ravel()
            counts += np.bincount(values, minlength=len(counts))
            sums += np.bincount(values, self.confidence[top : top + _BAND].ravel(), len(counts))
        return [
            ClassArea(
                self.classes[k], int(counts[k]), float(100 * counts[k] / self.mask.size), float(sums[k] / counts[k])
            )
            for k in np.flatnonzero(counts)
        ]

    def overlay(self, *, max_side: int | None = OVERLAY_SIDE, legend: bool = False) -> np.ndarray:
        """The image with the objects tinted and outlined.

        Args:
            max_side: a larger picture is made smaller; None: never (some 100 bytes a pixel while it is drawn).
            legend: add a strip below with the colours, names and shares of the classes.

        Returns:
            uint8 [h, w, 3]; without reduction and legend the image's own size.
        """
        height, width = self.mask.shape
        scale = 1 if max_side is None else min(1, max_side / max(height, width))
        pixels, mask = self.pixels, self.mask
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
            rows, columns = (np.arange(new) * old // new for new, old in zip(size[::-1], mask.shape, strict=True))
            mask = mask[np.ix_(rows, columns)]
        picture = overlay(pixels, mask, self.palette)
        return np.concatenate([picture, self._legend(picture.shape[1])]) if legend else picture

    def save(self, path: str | Path) -> None:
        """Write the mask as an index PNG with the palette; the file appears when it is complete."""
        save_mask(self.mask, self.palette, Path(path))

    def _legend(self, width: int) -> np.ndarray:
        """uint8 [height, width, 3]: a coloured square and a name for every object class, largest first."""
        font = font_for(self.classes, max(11, min(24, width // 40)))
        line, gap = round(font.size * 1.7), round(font.size * 0.6)
        areas = sorted((area for area in self.areas() if area.name != self.classes[0]), key=lambda area: -area.pixels)
        boxes, left, top = [], gap, gap // 2
        for area in areas:
            text = f"{area.name} {area.percent:.1f} %"
            needed = font.size + gap // 2 + round(font.getlength(text)) + 2 * gap
            if left > gap and left + needed > width:
                left, top = gap, top + line
            boxes.append((left, top, text, self.classes.index(area.name)))
            left += needed
        strip = Image.new("RGB", (width, top + line), _LEGEND_PAPER)
        draw = ImageDraw.Draw(strip)
        for left, top, text, value in boxes:
            fill = tuple(map(int, self.palette[value]))
            draw.rectangle((left, top, left + font.size, top + font.size), fill=fill)
            draw.text((left + font.size + gap // 2, top - font.size // 8), text, font=font, fill=_LEGEND_INK)
        return np.asarray(strip)


def save_mask(mask: np.ndarray, palette: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W] as an index PNG; see `Segmentation.save`."""
    image = Image.fromarray(mask)
    image.putpalette(palette.astype(np.uint8).tobytes())
    save_image(image, path, format="PNG")


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write beside `path`, making its folder, then move to it: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_with(path, lambda partial: image.save(partial, **options))
