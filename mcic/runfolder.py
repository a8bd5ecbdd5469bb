"""What a run left in its folder, read back for a report: no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mcic.preview import EXAMPLES


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
        return (self.config.get(group) or {}).get(name)


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
        metrics=_read_lines(path / "metrics.jsonl"),
        evaluations=_read_lines(path / "evaluations.jsonl"),
        summary=read_document(path / "summary.json", dict),
        examples=read_document(path / EXAMPLES / "index.json", list),
        readings=read_document(path / EXAMPLES / "readings.json", dict),
    )


def finite(mapping: dict[str, Any], key: str) -> float | None:
    """`mapping[key]` if it is a finite number, else None."""
    value = mapping.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


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
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, got a {type(content).__name__}")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line, by step; of the steps that a resumed run repeated, the last counts."""
    if not path.is_file():
        return []
    rows: dict[float, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for place, line in enumerate(lines[:-1]):  # after the last line's end: nothing, or what an interruption tore
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {place + 1}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {place + 1}: expected an object, got {type(row).__name__}")
        rows[row.get("step", place)] = row
    return [rows[step] for step in sorted(rows)]
