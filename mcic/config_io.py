"""`config.yaml`: a configuration as text and back, exactly. What a person wrote into it is checked like a flag."""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mcic.config import Config
from mcic.suggest import nearest
from mcic.untrusted import read_yaml, shown

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML in the order of its fields."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote; fields that are absent have their defaults.

    Raises:
        ValueError: not YAML, an unknown field (the nearest is suggested), or a value that its field cannot have.
        FileNotFoundError: no such file.
    """
    content = read_yaml(Path(path))
    try:
        return config_from_dict(content or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_dict(values: Any) -> Config:
    """The configuration from nested mappings as `dataclasses.asdict` makes them; lists may stand for tuples.

    Raises ValueError as `load_config` does.
    """
    return _build(Config, values, "")


def element_types(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type without None: `int | None` gives `(int,)`."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(option for option in options if option is not type(None))


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(
            f"{prefix.rstrip('.') or 'a configuration'} must be a mapping of fields, got {shown(repr(values))}"
        )
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ValueError(f"{prefix}{shown(str(name))} is no field of the configuration{nearest(str(name), hints)}")
    return cls(**{name: _convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def _convert(value: Any, hint: Any, field: str) -> Any:
    """`value` as the type that `hint` names, or a ValueError that says what `field` may be."""
    if value is None and type(None) in get_args(hint):
        return None
    (kind,) = element_types(hint)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{field}.")
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        hinted = nearest(str(value), map(str, get_args(kind)))
        raise ValueError(
            f"{field} must be one of {', '.join(map(str, get_args(kind)))}, got {shown(repr(value))}{hinted}"
        )
    if get_origin(kind) is tuple:
        return _convert_tuple(value, get_args(kind), field)
    if kind is float:
        return _convert_float(value, field)
    if type(value) is not kind:  # not isinstance: True is an int
        raise ValueError(f"{field} must be {_NAMES[kind]}, got {shown(repr(value))}")
    return value


def _convert_tuple(value: Any, kinds: tuple[Any, ...], field: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be a list, got {shown(repr(value))}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{field} must have {len(kinds)} values, got {shown(repr(value))}")
    return tuple(_convert(entry, kind, field) for entry, kind in zip(value, kinds, strict=True))


def _convert_float(value: Any, field: str) -> float:
    """A number; also as text, since YAML takes `1e-3`, which has no dot, for text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{field} must be a number, got {shown(repr(value))}")
    return number
