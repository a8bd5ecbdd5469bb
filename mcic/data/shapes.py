"""`shapes`: an embedded data set, drawn from a seed when it is asked for.

Each of six classes has a small telling part, a badge of fixed colour, and a much larger body that shows its class only
by the kind of its pattern: colours, scale, direction and outline of the body vary freely, and some bodies wear the
pattern of another class. The badge is sometimes tiny and sometimes hidden. A classifier can live on the badges, so its
activation maps cover too little of the objects: the failing of class activation maps that the method addresses.
Backgrounds are textured and cluttered with patches that carry no class pattern; objects hide each other and leave the
frame.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from mcic.data.base import Dataset
from mcic.data.palette import voc_palette

CLASSES = ("striped", "dotted", "checked", "ringed", "waved", "crossed")

BADGE_COLORS = np.array(
    [[0.90, 0.12, 0.12], [0.10, 0.45, 0.95], [0.98, 0.80, 0.05], [0.10, 0.70, 0.25], [0.75, 0.15, 0.80],
     [0.98, 0.50, 0.05]]
)  # fmt: skip
DISGUISED = 0.15
"""share of objects whose body has the pattern of another class; their badge is always drawn"""
BADGE_HIDDEN = 0.2
"""share of the other objects whose badge is not drawn"""
MIN_VISIBLE = 60
"""pixels below which an object is not tagged and its drawing is undone"""

Grid = tuple[np.ndarray, np.ndarray]


class Shapes(Dataset):
    """Procedural images of one to three patterned objects.

    Args:
        split: `train` or `val`; the two share no image.
        count: number of images.
        seed: of the whole set; image i is a pure function of (seed, split, i).
        size: side of the square images, pixels, ≥ 96.
    """

    name = "shapes"
    classes = CLASSES

    def __init__(self, split: str, *, count: int, seed: int = 0, size: int = 97) -> None:
        if size < 96:
            raise ValueError(f"shapes are drawn at 96 pixels or more, got size {size}")
        self.palette = voc_palette(len(CLASSES) + 1)
        stream = {"train": 0, "val": 1}[split]
        drawn = [draw_scene(np.random.default_rng([seed, stream, index]), size) for index in range(count)]
        self._images = np.stack([image for image, _ in drawn])
        self._masks = np.stack([mask for _, mask in drawn])
        self.ids = [f"{split}_{index:05d}" for index in range(count)]
        self.tags = np.stack([(self._masks == label).any((1, 2)) for label in range(1, len(CLASSES) + 1)], 1)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]

    def mask(self, index: int) -> np.ndarray:
        return self._masks[index]

    def _keep(self, indices: np.ndarray) -> None:
        super()._keep(indices)
        self._images, self._masks = self._images[indices], self._masks[indices]


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 [size, size, 3] and its mask uint8 [size, size]."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    grid = (columns, rows)
    canvas = _texture(rng, size)
    for _ in range(rng.integers(3, 9)):
        _draw_clutter(rng, canvas, grid)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])):
        before = canvas.copy(), mask.copy()
        _draw_object(rng, canvas, mask, grid)
        areas = np.bincount(mask.ravel(), minlength=len(CLASSES) + 1)
        if (areas[np.unique(mask)] < MIN_VISIBLE).any():
            canvas, mask = before
    if not mask.any():
        return draw_scene(rng, size)
    canvas *= rng.uniform(0.75, 1.15)
    canvas += rng.normal(0, rng.uniform(0.01, 0.04), canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), mask


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A background: two colours mixed by smooth noise of two scales and a gradient."""
    first, second = _muted(rng.uniform(0.1, 0.9, (2, 3)))
    mix = 0.6 * _noise(rng, size, rng.integers(3, 6)) + 0.4 * _noise(rng, size, rng.integers(8, 24))
    ramp = np.linspace(-0.15, 0.15, size)[None, :, None] * rng.choice([-1, 1])
    return first + (second - first) * mix[..., None] + ramp


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in 0…1 with `cells` bumps along a side."""
    coarse = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def _draw_clutter(rng: np.random.Generator, canvas: np.ndarray, grid: Grid) -> None:
    """A flat or softly shaded patch, or a bar; none of the class patterns."""
    size = canvas.shape[0]
    center = rng.uniform(0, size, 2)
    radius = rng.uniform(3, 14)
    inside = _outline(rng, grid, center, radius, stretch=rng.uniform(0.25, 1.0))
    color = _muted(rng.uniform(0, 1, 3))
    shade = 0.3 * _noise(rng, size, 4)[..., None] if rng.random() < 0.5 else 0.0
    canvas[inside] = (color + shade * np.ones_like(canvas))[inside]


def _draw_object(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, grid: Grid) -> None:
    size = canvas.shape[0]
    label = int(rng.integers(len(CLASSES)))
    radius = size * rng.uniform(0.15, 0.32)
    center = rng.uniform(0.12 * size, 0.88 * size, 2)
    angle = rng.uniform(0, 2 * np.pi)
    body = _outline(rng, grid, center, radius, stretch=rng.uniform(0.55, 1.0))
    u, v = _turned(grid, center, angle)
    dark, light = _contrasting_colors(rng)
    disguised = rng.random() < DISGUISED
    kind = (label + len(CLASSES) // 2) % len(CLASSES) if disguised else label
    pattern = PATTERNS[kind](u, v, size * rng.uniform(0.075, 0.13))
    canvas[body] = np.where(pattern[..., None], dark, light)[body]
    mask[body] = label + 1
    if disguised or rng.random() > BADGE_HIDDEN:
        _draw_badge(rng, canvas, mask, grid, center, radius, label)


def _draw_badge(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, grid: Grid, center: np.ndarray, radius: float,
    label: int,
) -> None:  # fmt: skip
    """A disc of the class's colour with a light middle, somewhere on the body."""
    reach = radius * rng.uniform(0.3, 0.7)
    direction = rng.uniform(0, 2 * np.pi)
    middle = center + reach * np.array([np.cos(direction), np.sin(direction)])
    size = canvas.shape[0] * (0.035 if rng.random() < 0.2 else rng.uniform(0.06, 0.085))
    x, y = grid[0] - middle[0], grid[1] - middle[1]
    disc = np.hypot(x, y) < size
    canvas[disc] = BADGE_COLORS[label] * rng.uniform(0.85, 1.1)
    canvas[np.hypot(x, y) < 0.35 * size] = 0.95
    mask[disc] = label + 1


def _outline(rng: np.random.Generator, grid: Grid, center: np.ndarray, radius: float, *, stretch: float) -> np.ndarray:
    """A random closed shape: superellipse with a wavy rim, turned and stretched."""
    u, v = _turned(grid, center, rng.uniform(0, 2 * np.pi))
    v = v / stretch
    power = rng.choice([1.2, 2.0, 4.0])
    distance = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
    theta = np.arctan2(v, u)
    lobes = rng.integers(2, 6)
    rim = 1 + rng.uniform(0, 0.18) * np.cos(lobes * theta + rng.uniform(0, 2 * np.pi))
    return distance < radius * rim


def _turned(grid: Grid, center: np.ndarray, angle: float) -> Grid:
    x, y = grid[0] - center[0], grid[1] - center[1]
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _muted(colors: np.ndarray) -> np.ndarray:
    """Colours [..., 3] nearer to grey: strong ones are left to the badges."""
    grey = colors.mean(-1, keepdims=True)
    return grey + 0.45 * (colors - grey)


def _contrasting_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours that differ clearly in brightness."""
    dark = _muted(rng.uniform(0.0, 0.55, 3))
    return dark, (dark + rng.uniform(0.25, 0.45, 3)).clip(0, 1)


def _stripes(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.sin(2 * np.pi * u / period) > 0


def _dots(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.hypot((u % period) - period / 2, (v % period) - period / 2) < 0.3 * period


def _checks(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return (np.sin(2 * np.pi * u / period) > 0) ^ (np.sin(2 * np.pi * v / period) > 0)


def _rings(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.sin(2 * np.pi * np.hypot(u, v) / period) > 0


def _waves(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.sin(2 * np.pi * (u + 0.45 * period * np.sin(2 * np.pi * v / (1.6 * period))) / period) > 0


def _crosses(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return (np.abs((u % period) - period / 2) < 0.14 * period) | (np.abs((v % period) - period / 2) < 0.14 * period)


PATTERNS: tuple[Callable[[np.ndarray, np.ndarray, float], np.ndarray], ...] = (
    _stripes, _dots, _checks, _rings, _waves, _crosses,
)  # fmt: skip
