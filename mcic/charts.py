"""Charts as SVG text: numpy and the standard library, nothing to load in the browser.

Colours are names of CSS custom properties, so that the page's light and dark themes apply. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 36
_DOTTED = 12  # a curve of so few points shows them


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        name: as the legend says it.
        color: CSS custom property without the dashes, e.g. "cam".
        values: float [T] over the chart's x; NaN where there is none.
        dashed: draw it dashed.
    """

    name: str
    color: str
    values: np.ndarray
    dashed: bool = False


def number(value: float | None, digits: int = 3) -> str:
    """`value` with that many significant digits and no exponent where a person needs none; "–" for none or NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return _scientific(value, digits)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}".replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low…high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    x: np.ndarray, lines: Sequence[Line], *, label: str, x_label: str = "step", top: float | None = None, bins: int = 80
) -> str:
    """Curves over a common x, from 0 up: axes, grid, and a hover title with every value per place.

    Args:
        x: float [T], ascending.
        lines: the curves; values are averaged within `bins` equal parts of x.
        label: what the chart shows, for screen readers.
        x_label: name of the x axis.
        top: upper end of the y axis; the largest average when None.
        bins: most places drawn.

    Returns:
        `<svg>…</svg>`; an empty string if no line has a finite value.
    """
    centers, means = _bin_means(x, [line.values for line in lines], bins)
    if not np.isfinite(means).any():
        return ""
    lowest = min(0.0, float(np.nanmin(means)))
    highest = top if top is not None else float(np.nanmax(means)) * 1.04
    highest = highest if highest > lowest else lowest + max(1.0, abs(lowest))
    plot = _Plot(float(centers[0]), float(centers[-1]), lowest, highest)
    parts = [plot.axes(x_label)]
    for line, values in zip(lines, means, strict=True):
        points = [(plot.x(a), plot.y(v)) for a, v in zip(centers, values, strict=True) if math.isfinite(v)]
        parts.append(_polyline(points, line))
    edges = [_LEFT, *((plot.x(a) + plot.x(b)) / 2 for a, b in pairwise(centers)), _WIDTH - _RIGHT]
    for i, center in enumerate(centers):
        parts.append(_hover(plot, center, means[:, i], lines, edges[i : i + 2], x_label))
    return _svg(_WIDTH, _HEIGHT, label, parts)


def confusion_chart(confusion: np.ndarray, classes: Sequence[str], *, numbers_up_to: int = 24) -> str:
    """A confusion matrix as a heat map, each row in percent of its true pixels.

    Args:
        confusion: int [K, K], rows truth, columns prediction.
        classes: K names.
        numbers_up_to: largest K whose cells carry their numbers; every cell has a hover title.

    Returns:
        `<svg>…</svg>`.
    """
    totals = confusion.sum(axis=1, keepdims=True)
    shares = 100 * confusion / np.maximum(totals, 1)
    side = 40 if len(classes) <= 12 else 30 if len(classes) <= numbers_up_to else 14
    longest = max((len(name) for name in classes), default=0)
    edge = 36 + 7 * min(18, longest)
    width = len(classes) * side
    parts = [f'<text class="axis" x="{edge}" y="14">predicted →</text><text class="axis" x="0" y="14">truth ↓</text>']
    for k, name in enumerate(classes):
        middle, short = edge + (k + 0.5) * side + 4, escape(name if len(name) <= 18 else name[:17] + "…")
        parts.append(
            f'<text class="name" text-anchor="end" x="{edge - 8}" y="{middle:.1f}">{short}</text>'
            f'<text class="name" transform="translate({middle:.1f} {edge - 8}) rotate(-90)">{short}</text>'
            f'<rect class="empty" x="{edge}" y="{edge + k * side}" width="{width}" height="{side - 1}"/>'
        )
    for row, column in np.argwhere(confusion > 0).tolist():
        title = (
            f"{classes[row]} → {classes[column]}: {shares[row, column]:.1f} % of the true pixels "
            f"({int(confusion[row, column]):,})"
        )
        box = (edge + column * side, edge + row * side)
        parts.append(_confusion_cell(box, side, shares[row, column], title, numbered=len(classes) <= numbers_up_to))
    size = edge + width
    return _svg(size, size, "Confusion matrix, rows truth, columns prediction", parts, css_class="confusion")


@dataclass(frozen=True, slots=True)
class _Plot:
    """The map from data to the drawing, and its axes."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = self.right - self.left
        share = (value - self.left) / span if span > 0 else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str) -> str:
        """SVG of the grid lines, the numbers at them and the label of the horizontal axis."""
        parts = []
        for value in ticks(self.low, self.high, 5):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_tick_text(value)}</text>')
        base = _HEIGHT - _BOTTOM
        for value in ticks(self.left, self.right, 5):
            parts.append(
                f'<text text-anchor="middle" x="{self.x(value):.1f}" y="{base + 17}">{_tick_text(value)}</text>'
            )
        parts.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(
            f'<text class="axis" text-anchor="end" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}">{escape(x_label)}</text>'
        )
        return "".join(parts)


def _bin_means(x: np.ndarray, curves: Sequence[np.ndarray], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of x [P] and of every curve [len(curves), P] over P ≤ bins runs of neighbouring samples."""
    groups = np.array_split(np.arange(len(x)), min(bins, max(1, len(x))))
    groups = [group for group in groups if len(group)]

    def mean(values: np.ndarray) -> float:
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if len(finite) else math.nan

    means = np.array([[mean(curve[group]) for group in groups] for curve in curves]).reshape(len(curves), len(groups))
    return np.array([x[group].mean() for group in groups]), means


def _polyline(points: Sequence[tuple[float, float]], line: Line) -> str:
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = points if len(points) <= _DOTTED else []
    return f'<polyline class="curve" stroke="var(--{line.color})"{dash} points="{path}"/>' + "".join(
        f'<circle r="3" cx="{x:.1f}" cy="{y:.1f}" fill="var(--{line.color})"/>' for x, y in dots
    )


def _hover(
    plot: _Plot, center: float, values: np.ndarray, lines: Sequence[Line], edges: Sequence[float], x_label: str
) -> str:
    """A strip over one place of x: a rule and dots that the pointer reveals, and a title with the values."""
    shown = [(line, v) for line, v in zip(lines, values.tolist(), strict=True) if math.isfinite(v)]
    x = f"{plot.x(center):.1f}"
    title = "\n".join([f"{x_label} {center:,.0f}", *(f"{line.name}: {number(v, 4)}" for line, v in shown)])
    dots = "".join(f'<circle r="3" cx="{x}" cy="{plot.y(v):.1f}" fill="var(--{line.color})"/>' for line, v in shown)
    base = _HEIGHT - _BOTTOM
    return (
        f'<g class="place"><title>{escape(title)}</title>'
        f'<rect x="{edges[0]:.1f}" y="{_TOP}" width="{max(0.0, edges[1] - edges[0]):.1f}" height="{base - _TOP}"/>'
        f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{base}"/>{dots}</g>'
    )


def _confusion_cell(box: tuple[int, int], side: int, share: float, title: str, *, numbered: bool) -> str:
    x, y = box
    opacity = (share / 100) ** 0.6  # small confusions must show beside a strong diagonal
    text = ""
    if numbered and share >= 0.5:
        css = "strong" if opacity > 0.6 else "weak"
        text = f'<text class="{css}" text-anchor="middle" x="{x + side / 2}" y="{y + side / 2 + 4}">{share:.0f}</text>'
    return (
        f'<g><title>{escape(title)}</title><rect class="cell" x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" '
        f'fill-opacity="{opacity:.3f}"/>{text}</g>'
    )


def _tick_text(value: float) -> str:
    if 0 < abs(value) < 0.01:
        return _scientific(value, 2)
    return f"{float(f'{value:.6g}'):,.10g}".replace("-", "−")


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _svg(width: float, height: float, label: str, parts: Sequence[str], *, css_class: str = "chart") -> str:
    return (
        f'<svg class="{css_class}" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
