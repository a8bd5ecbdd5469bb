"""The flags of the training command: one per field of the configuration, in its order."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mcic.config import Config
from mcic.config_io import element_types

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


@dataclass(frozen=True, slots=True)
class Flag:
    """A field `group.field` of the configuration as the command line shows it.

    Attributes:
        kind: its type, None left out.
        optional: whether it may be None (unset).
        help: the docstring under the field.
    """

    group: str
    field: str
    kind: Any
    optional: bool
    help: str

    @property
    def name(self) -> str:
        """`--group.field-name`"""
        return f"--{self.group}.{self.field.replace('_', '-')}"

    @property
    def negative(self) -> str | None:
        """The flag that switches a boolean off."""
        return f"--{self.group}.no-{self.field.replace('_', '-')}" if self.kind is bool else None

    @property
    def element(self) -> Any:
        """The type of one word after the name."""
        return get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that each of its values must be one of; none where it is free."""
        return get_args(self.element) if get_origin(self.element) is Literal else ()

    @property
    def num_words(self) -> int | None:
        """How many words follow its name; None where any number may."""
        if get_origin(self.kind) is tuple:
            return None if Ellipsis in get_args(self.kind) else len(get_args(self.kind))
        return 0 if self.kind is bool else 1

    @property
    def metavar(self) -> str:
        """What to type after the name."""
        one = "|".join(self.choices) or _METAVARS.get(self.element, "")
        return f"{one} …" if self.num_words is None else " ".join([one] * self.num_words)


@cache
def groups() -> dict[str, str]:
    """The first line of every group's docstring, by the group's name."""
    return {name: (inspect.getdoc(cls) or "").splitlines()[0] for name, cls in _group_classes().items()}


@cache
def flags() -> tuple[Flag, ...]:
    """All flags, group by group."""
    return tuple(flag for group, cls in _group_classes().items() for flag in _flags_of(group, cls))


def _group_classes() -> dict[str, type]:
    return {name: hint for name, hint in get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}


def _flags_of(group: str, cls: type) -> list[Flag]:
    docs = _field_docs(cls)
    found = []
    for name, hint in get_type_hints(cls).items():
        (kind,) = element_types(hint)
        found.append(Flag(group, name, kind, type(None) in get_args(hint), docs[name]))
    return found


def _field_docs(cls: type) -> dict[str, str]:
    """The string that follows each field in the source of `cls`."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(inspect.cleandoc(doc.value.value).split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
