"""What the commands share: arguments to a dataclass, paths to run folders, scores to table rows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, TypeVar

import tyro

from mcic.suggest import nearest
from mcic.untrusted import read_json

Args = TypeVar("Args")


def parse(kind: type[Args], argv: list[str], *, command: str) -> Args:
    """The command line as a `kind`, a dataclass whose docstring and field docstrings are the help.

    Raises:
        ValueError: what is wrong with the command line, in one sentence.
        SystemExit: status 0, after help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"mcic {command}", args=argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        cause = stop.__context__
        raise ValueError(str(cause) if isinstance(cause, ValueError) else sentence(said.getvalue())) from None


def sentence(boxed: str) -> str:
    """tyro's message without its box and the list of similar flags' help."""
    lines = [line.strip("│ ") for line in boxed.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join(line for line in lines if line.strip("─"))
    return re.sub(r"\s+", " ", text.partition("For full helptext")[0]).strip()


def run_folder(path: Path) -> Path:
    """`path` if it is a run folder; else a ValueError that names the nearest one beside it."""
    if (path / "config.yaml").is_file():
        return path
    beside = [folder.parent.name for folder in path.parent.glob("*/config.yaml")]
    raise ValueError(f"{path} is no run folder: expected a config.yaml in it{nearest(path.name, beside)}")


def json_file(word: str | None, *, holds: tuple[str, ...]) -> Path | None:
    """The file that --json names; None for none and for -, which prints.

    Raises:
        ValueError: it does not end with .json, its folder is not there, or it is a file without the entries `holds`,
            which an earlier one of these would have.
    """
    if word in (None, "-"):
        return None
    file = Path(word)
    if file.suffix != ".json" or not file.parent.is_dir():
        raise ValueError(f"--json takes - or a file that ends with .json in a folder that exists, got {word}")
    if file.exists():
        try:
            found = read_json(file)
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or not set(holds) <= found.keys():
            raise ValueError(f"--json {word} is a file of another kind, which would be lost: choose another name")
    return file


def score_rows(scores: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The scores, which have a slash in their name, then the IoU of every class; percent."""
    rows = [(key, percent(value), "") for key, value in scores.items() if "/" in key]
    for part, values in scores.get("per_class", {}).items():
        rows += [(name, percent(value), part) for name, value in zip(scores["classes"], values, strict=True)]
    return rows


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
