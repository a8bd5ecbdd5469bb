"""Drawing: masks, heatmaps and labelled grids as uint8 arrays, and the examples that a report shows.

numpy and Pillow only, but for letters beyond ASCII, whose font matplotlib finds. Pixels are uint8 [H, W, 3] RGB; masks
are uint8 [H, W], 0 background, 255 ignore.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mcic.fonts import font_for

IGNORE = 255
EXAMPLES = Path("previews/final")
"""where a run folder keeps its examples"""

# Nine equidistant colours of matplotlib's "inferno" (CC0), whose lightness grows evenly with the value.
_INFERNO = np.array(
    [(0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84),
     (228, 90, 49), (249, 142, 9), (249, 203, 53), (252, 255, 164)]
)  # fmt: skip
_PAPER, _INK, _FAINT = (250, 250, 248), (38, 38, 36), (228, 228, 224)


def ignore_hatch(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the diagonal stripes, light grey on white, that stand for ignored pixels."""
    stripe = (np.arange(height)[:, None] + np.arange(width)) % 8 < 3
    return np.repeat(np.where(stripe, 196, 244).astype(np.uint8)[..., None], 3, axis=2)


def colorize(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Paint a mask in its palette.

    Args:
        mask: uint8 [H, W]; 255 is ignore and becomes a light hatch, which no plain colour can be mistaken for.
        palette: uint8 [K, 3], RGB of the values 0…K-1.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: a value is neither below K nor 255.
    """
    palette = np.asarray(palette, dtype=np.uint8)
    known = mask < len(palette)
    if not np.all(known | (mask == IGNORE)):
        wrong = sorted(set(np.unique(mask[~known]).tolist()) - {IGNORE})
        raise ValueError(f"mask has the values {wrong}, but the palette has {len(palette)} colours; 255 is ignore")
    colors = palette[np.where(known, mask, 0)]
    return np.where(known[..., None], colors, ignore_hatch(*mask.shape))


def overlay(pixels: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Lay a mask over its image: background shows the image, objects are tinted and outlined, ignore is hatched.

    Args:
        pixels: uint8 [H, W, 3].
        mask: uint8 [H, W].
        palette: uint8 [K, 3].
        alpha: share of the mask's colour inside an object, 0…1; its outline has all of it.

    Returns:
        uint8 [H, W, 3].
    """
    _same_size(pixels, mask)
    weight = np.where(_outline(mask), 1.0, alpha) * (mask > 0)
    return _blend(pixels, colorize(mask, palette), weight)


def heat(pixels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Lay scores over the grey image, in a colour map of even lightness (dark 0, bright yellow 1).

    Args:
        pixels: uint8 [H, W, 3].
        scores: float [H, W] in 0…1; values outside are clipped, NaN counts as 0.

    Returns:
        uint8 [H, W, 3].
    """
    _same_size(pixels, scores)
    scores = np.clip(np.nan_to_num(np.asarray(scores, dtype=np.float32), nan=0.0), 0, 1)
    anchors = np.linspace(0, 1, len(_INFERNO))
    colors = np.stack([np.interp(scores, anchors, channel) for channel in _INFERNO.T], axis=-1)
    grey = np.repeat((pixels @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    return _blend(grey, colors, 0.5 + 0.35 * scores)  # the image stays readable where the scores say nothing


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]], titles: Sequence[str], captions: Sequence[str], cell: int = 160
) -> np.ndarray:
    """One labelled grid of images: a title over each column, a caption over each row.

    Args:
        rows: images uint8 [h, w, 3] of any size, fitted into square cells; None leaves a cell empty.
        titles: one per column.
        captions: one per row; text that is too long ends in an ellipsis.
        cell: side of a cell, pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: the numbers of rows and captions, or of columns and titles, differ.
    """
    if len(captions) != len(rows) or any(len(row) != len(titles) for row in rows):
        widths = sorted({len(row) for row in rows})
        raise ValueError(
            f"a contact sheet needs a caption per row and a title per column: got {len(rows)} rows of {widths} images, "
            f"{len(captions)} captions, {len(titles)} titles"
        )
    font = font_for([*titles, *captions], max(11, cell // 12))
    line, gap, margin = round(font.size * 1.6), 6, 14
    step = cell + gap
    width = 2 * margin + max(1, len(titles)) * step - gap
    height = 2 * margin + line + len(rows) * (line + step)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((margin + column * step, margin), _fit_text(title, font, cell), font=font, fill=_INK)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = margin + line + i * (line + step)
        draw.line((margin, top, width - margin, top), fill=_FAINT)
        draw.text((margin, top + line // 5), _fit_text(caption, font, width - 2 * margin), font=font, fill=_INK)
        for column, pixels in enumerate(row):
            box = (margin + column * step, top + line)
            draw.rectangle((*box, box[0] + cell - 1, box[1] + cell - 1), fill=_FAINT)
            if pixels is not None:
                image = _fit_image(pixels, cell)
                sheet.paste(image, (box[0] + (cell - image.width) // 2, box[1] + (cell - image.height) // 2))
    return np.asarray(sheet)


@dataclass(frozen=True, slots=True)
class Source:
    """An image as a bank knows it: where its contexts of one class came from.

    Attributes:
        class_name: the class.
        image: the image's name in its data set, or None where it is unknown.
        contexts: how many of the bank's entries these are.
    """

    class_name: str
    image: str | None
    contexts: int


@dataclass(frozen=True, slots=True)
class CellReading:
    """What the pixels of an image read from the bank, on a grid of equal cells that covers the image.

    Attributes:
        sources: int [rows, columns, k], places in a list of `Source`, those with the largest weights first.
        weights: float [rows, columns, k] in 0…1; what they lack of 1 was read from all other sources.
    """

    sources: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Example:
    """One image of the report's gallery.

    Attributes:
        id: the image's name in its data set.
        tags: names of its classes.
        pixels: uint8 [H, W, 3], shown first, as the panel "image".
        panels: uint8 [H, W, 3] images by what they show ("CAM mask", "prediction", …), in the order of showing.
        iou: percent by panel name; None where it is not defined.
        uncertainty: percent, the mean over the pixels of 1 - probability of the predicted class; None: not known.
        reading: what its pixels read from the bank; None: there is none.
    """

    id: str
    tags: tuple[str, ...]
    pixels: np.ndarray
    panels: dict[str, np.ndarray]
    iou: dict[str, float | None]
    uncertainty: float | None = None
    reading: CellReading | None = None


def write_examples(
    folder: Path, examples: Sequence[Example], *, sources: Sequence[Source] = (),
    thumbnails: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """Store examples in a run folder, below `previews/final/`; earlier examples of the run are replaced.

    `<nnn>-<panel>.png` are the panels. `index.json` is a list of {"id", "tags", "iou", "uncertainty", "panels":
    {panel name: file name}}. Where any example has a reading there is `readings.json`: {"sources": [{"class", "image",
    "contexts"}], "thumbnails": {image name: file name}, "readings": [one for each example, null or {"rows", "columns",
    "sources", "weights"}]}, where the last two are `CellReading`'s, flat, and the weights are in 1/10000.

    Args:
        folder: the run folder.
        examples: what to store.
        sources: what the readings refer to; those that nothing refers to are not stored.
        thumbnails: uint8 [h, w, 3] by the image name of a source; may lack some.

    Returns:
        The path of the index.
    """
    target = Path(folder) / EXAMPLES
    target.mkdir(parents=True, exist_ok=True)
    index_path, readings_path = target / "index.json", target / "readings.json"
    index_path.unlink(missing_ok=True)  # an index never names the images of another run
    readings_path.unlink(missing_ok=True)
    for old in (*target.glob("[0-9]*-*.png"), *target.glob("bank-[0-9]*.png")):
        old.unlink()
    index = [_write_example(target, number, example) for number, example in enumerate(examples)]
    if any(example.reading is not None for example in examples):
        readings = _readings(examples, sources) | {"thumbnails": _write_thumbnails(target, thumbnails)}
        readings_path.write_text(json.dumps(readings, ensure_ascii=False), encoding="utf-8")
    index_path.write_text(json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return index_path


def _readings(examples: Sequence[Example], sources: Sequence[Source]) -> dict[str, Any]:
    read = [np.unique(example.reading.sources) for example in examples if example.reading is not None]
    used = np.unique(np.concatenate(read))
    return {
        "sources": [
            {"class": source.class_name, "image": source.image, "contexts": source.contexts}
            for source in (sources[place] for place in used.tolist())
        ],
        "readings": [example.reading and _flat_reading(example.reading, used) for example in examples],
    }


def _flat_reading(reading: CellReading, used: np.ndarray) -> dict[str, Any]:
    rows, columns, _ = reading.sources.shape
    return {
        "rows": rows,
        "columns": columns,
        "sources": np.searchsorted(used, reading.sources).ravel().tolist(),
        "weights": np.rint(reading.weights * 10_000).astype(int).ravel().tolist(),
    }


def _write_thumbnails(target: Path, thumbnails: Mapping[str, np.ndarray]) -> dict[str, str]:
    files = {name: f"bank-{number:03d}.png" for number, name in enumerate(thumbnails)}
    for name, pixels in thumbnails.items():
        Image.fromarray(pixels).save(target / files[name])
    return files


def _write_example(target: Path, number: int, example: Example) -> dict[str, object]:
    files = {}
    for name, pixels in {"image": example.pixels, **example.panels}.items():
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "panel"
        file = f"{number:03d}-{slug}.png"
        if file in files.values():  # two names, one slug
            file = f"{number:03d}-{slug}-{len(files)}.png"
        Image.fromarray(pixels).save(target / file)
        files[name] = file
    return {
        "id": example.id,
        "tags": list(example.tags),
        "iou": {name: _finite(value) for name, value in example.iou.items()},
        "uncertainty": _finite(example.uncertainty),
        "panels": files,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _same_size(pixels: np.ndarray, plane: np.ndarray) -> None:
    if pixels.shape[:2] != plane.shape or pixels.shape[2:] != (3,):
        raise ValueError(f"expected pixels [H, W, 3] and a plane [H, W], got {pixels.shape} and {plane.shape}")


def _blend(below: np.ndarray, above: np.ndarray, weight: np.ndarray) -> np.ndarray:
    weight = weight[..., None]
    return np.rint(below * (1 - weight) + above * weight).astype(np.uint8)


def _outline(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: object pixels with a right or lower neighbour, or a left or upper one, of another value."""
    edge = np.zeros(mask.shape, dtype=bool)
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (mask != IGNORE)


def _fit_image(pixels: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = cell / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.HAMMING)  # smooth, and no ringing at the flat colours of masks


def _fit_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
