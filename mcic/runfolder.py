"""What a run left in its folder, read back for a report: no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcic.preview import EXAMPLES
from mcic.untrusted import parse_json, read_json, read_yaml, shown

_HUGE = 1e100


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_score(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


Shape = Callable[[Any], bool] | list | dict
"""what a value must be: a test of it; [shape] a list of such; {...: shape} an object of such; {"key": shape} an object
with the key, or, with a ? at the end of the key, perhaps with it"""

_SUMMARY = {
    "classes?": [_is_text], "palette?": [_is_color], "per_class?": {...: [_is_score]}, "confusion?": [[_is_count]],
}  # fmt: skip
_EXAMPLES = [
    {"id": _is_text, "tags?": [_is_text], "iou?": {...: _is_score}, "uncertainty?": _is_score,
     "panels": {...: _is_text}}
]  # fmt: skip
_READING = {"rows": _is_count, "columns": _is_count, "sources": [_is_count], "weights": [_is_count]}
_READINGS = {
    "sources?": [{"class": _is_text, "image?": _is_name, "contexts": _is_count}], "thumbnails?": {...: _is_text},
    "readings?": [lambda value: value is None or not _flaw(value, _READING)],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run; what is absent is empty.

    Attributes:
        path: the folder.
        config: `config.yaml`, groups of settings by name.
        env: `env.json`, versions and machine.
        metrics: `metrics.jsonl` in the order of its steps.
        evaluations: `evaluations.jsonl`, likewise.
        summary: `summary.json`, the final scores.
        examples: entries of `previews/final/index.json`, as `preview.write_examples` wrote them.
        readings: `previews/final/readings.json`, likewise: what their pixels read from the bank.
    """

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    examples: list[dict[str, Any]]
    readings: dict[str, Any]

    def setting(self, group: str, name: str) -> Any:
        """A value of the configuration, or None."""
        settings = self.config.get(group)
        return settings.get(name) if isinstance(settings, dict) else None


def read_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        ValueError: there is no `config.yaml`, neither `metrics.jsonl` nor `summary.json`, or a file cannot be read.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run folder: expected a config.yaml in it, as training writes it")
    if not (path / "metrics.jsonl").is_file() and not (path / "summary.json").is_file():
        raise ValueError(f"{path} has neither metrics.jsonl nor summary.json: the run stopped before its first step")
    return RunFolder(
        path=path,
        config=read_document(path / "config.yaml", dict),
        env=read_document(path / "env.json", dict),
        metrics=read_lines(path / "metrics.jsonl"),
        evaluations=read_lines(path / "evaluations.jsonl"),
        summary=_read_shaped(path / "summary.json", dict, _SUMMARY),
        examples=_read_shaped(path / EXAMPLES / "index.json", list, _EXAMPLES),
        readings=_read_shaped(path / EXAMPLES / "readings.json", dict, _READINGS),
    )


def finite(mapping: dict[str, Any], key: str) -> float | None:
    """`mapping[key]` if it is a number that can be drawn, else None."""
    value = mapping.get(key)
    return float(value) if _is_number(value) and abs(value) < _HUGE else None


def column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """float [len(rows)]: the values of `key`, NaN where there is no finite one."""
    values = (finite(row, key) for row in rows)
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def steps(rows: list[dict[str, Any]]) -> np.ndarray:
    """float [len(rows)]: the step of every row, its place where it has none."""
    return np.array([row.get("step", place) for place, row in enumerate(rows)], dtype=float)


def read_document(path: Path, kind: type) -> Any:
    """The content of a YAML or JSON file, which must be a `kind` (dict or list); an empty one where there is no file.

    Raises:
        ValueError: names the file, which is neither or holds something else.
    """
    if not path.is_file():
        return kind()
    content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, got a {type(content).__name__}")
    return content


def _read_shaped(path: Path, kind: type, shape: Shape) -> Any:
    """As `read_document`; the content must have the shape, and null at its top is as if absent."""
    content = read_document(path, kind)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    if content and (flaw := _flaw(content, shape)):
        raise ValueError(f"{path} is damaged: {flaw}")
    return content


def _flaw(value: Any, shape: Shape, name: str = "it") -> str:
    """What keeps a value from its shape, "" if nothing does."""
    if callable(shape):
        return "" if shape(value) else f"{name} is {shown(repr(value))}"
    if not isinstance(value, type(shape)):
        return f"{name} is {shown(repr(value))}"
    if isinstance(shape, list):
        parts = ((entry, shape[0], name) for entry in value)
    elif ... in shape:
        parts = ((entry, shape[...], shown(key)) for key, entry in value.items())
    else:
        lacking = [key for key in shape if not key.endswith("?") and key not in value]
        if lacking:
            return f"{name} has no {lacking[0]}"
        known = {key.rstrip("?"): inner for key, inner in shape.items()}
        parts = ((value[key], inner, key) for key, inner in known.items() if key in value)
    return next((flaw for entry, inner, key in parts if (flaw := _flaw(entry, inner, key))), "")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line, by step; of the steps that a resumed run repeated, the last counts."""
    if not path.is_file():
        return []
    rows: dict[float, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for place, line in enumerate(lines[:-1]):  # after the last line's end: nothing, or what an interruption tore
        if not line.strip():
            continue
        where = f"{path}, line {place + 1}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
        step = row.get("step", place)
        if not _is_number(step) or not 0 <= step < 2**53:
            raise ValueError(f"{where}: expected a number of steps, got {shown(str(step))}")
        rows[step] = row
    return [rows[step] for step in sorted(rows)]
