"""Reading text, JSON and YAML that nobody vouches for: what is wrong with it becomes one ValueError that names it."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""what PyYAML raises: the others escape it where a tag such as !!int stands before what is none"""

_SHOWN = 80  # characters


def require_file(path: str | Path) -> None:
    """Raise ValueError for a pipe, socket, device or folder, whose reading may never end; OSError for no file."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path} is no file: expected one, got a folder, pipe, socket or device")


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, with or without byte order mark.

    Raises:
        ValueError: another encoding, or no file but a pipe or the like.
        OSError: there is no such file, or it may not be read.
    """
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has a NUL in line {text[: text.index(chr(0))].count(chr(10)) + 1}; "
                         "save it as UTF-8")  # fmt: skip
    return text


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def parse_json(text: str, where: object) -> Any:
    """JSON whose objects name no key twice, where one of the values would be lost.

    Raises:
        ValueError: names `where`, that it is not JSON, and why.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file without aliases, by which a few lines stand for more than any memory holds.

    Raises:
        ValueError: names the file: it is not YAML, or has aliases.
        OSError: there is no such file, or it may not be read.
    """
    text = read_text(path)
    try:
        return _Loader(text).get_single_data()
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def shown(text: str) -> str:
    """What a file says as it may stand in a message: `printable`, and short."""
    return printable(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def printable(text: str) -> str:
    """A name without what a terminal would obey: such letters become escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)!r} comes twice in one object")
    return content


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)
