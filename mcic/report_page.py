"""What the pages of a report share: the template engine, how values are written, embedded pictures, the file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mcic import __version__
from mcic.charts import confusion_chart, number
from mcic.durable import write_text
from mcic.pictures import opened

GENERATOR = "mcic report"
"""by this name in its head a page is known as one of ours"""


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page from `templates/`; all that it is given is escaped, and only the script it carries may run."""
    script = files("mcic").joinpath("templates/report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"version": __version__, "generator": GENERATOR, "script": Markup(script), "script_hash": f"sha256-{digest}"}
    return _environment().get_template(template).render(own | dict(context))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mcic", "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": _percent, "signed": _signed, "setting": setting_text}
    return environment


def script_data(data: Any) -> Markup:
    """JSON that may stand between script tags: no "<" is left in it that could close them."""
    return Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def require_page(path: Path) -> Path:
    """`path` if a page may be written there.

    Raises:
        ValueError: there is no such folder, or a file that is none of our pages.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir() or (path.is_file() and GENERATOR.encode() not in path.read_bytes()[:2000]):
        raise ValueError(f"{path} exists and is no report: choose another --out")
    return path


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all."""
    write_text(path, page.encode(errors="replace").decode())  # names of files need not be text
    return path


def data_uri(path: Path, side: int) -> str | None:
    """A picture of at most `side` pixels: PNG where it has few colours, as plain masks do, else WebP; None: no file.

    Raises:
        ValueError: the file is no picture.
    """
    if not os.path.isfile(path):  # also of a name that no file can have
        return None
    with opened(path, "picture") as file:
        image = file.convert("RGB")
    flat = image.getcolors(256) is not None
    image.thumbnail((side, side), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if flat:
        image.quantize(256).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=82)
    return f"data:image/{'png' if flat else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def classes_of(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Name and CSS colour of every class; numbers and grey where the summary does not say."""
    per_class = [len(scores) for scores in (summary.get("per_class") or {}).values() if scores]
    names = summary.get("classes") or [f"class {k}" for k in range(max(per_class, default=0))]
    colors = [f"rgb({int(r)} {int(g)} {int(b)})" for r, g, b in summary.get("palette") or []]
    colors += ["gray"] * (len(names) - len(colors))
    return [{"name": str(name), "color": color} for name, color in zip(names, colors, strict=False)]


def confusion_svg(summary: dict[str, Any]) -> Markup | None:
    """The confusion matrix of a summary as a chart, or None where it has none."""
    names = [entry["name"] for entry in classes_of(summary)]
    rows = summary.get("confusion") or []
    if [len(row) for row in rows] != [len(names)] * len(names):
        return None
    counts = np.array(rows, dtype=np.int64)
    if not counts.any():
        return None
    return Markup(confusion_chart(counts, names))


def setting_text(value: Any) -> str:
    """A value of the configuration, or of a summary, as a person writes it."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "unset" if value is None else str(value)


def duration(seconds: float) -> str:
    """Seconds in hours, minutes and seconds: "1 h 5 min", "4 min 12 s", "9 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")
