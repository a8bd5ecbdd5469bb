"""`[PRESET] [--group.field VALUE …]` to a checked configuration."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import pairwise

import tyro

from mcic.cli.flags import Flag, flags, groups
from mcic.cli.help import print_help
from mcic.cli.parse import sentence
from mcic.config import Config
from mcic.presets import DEFAULT, PRESETS, preset
from mcic.suggest import nearest

_HELP = ("-h", "--help")
_NUMBERS = {int: "a whole number", float: "a number"}


def parse_train(argv: list[str], *, program: str = "train.py") -> Config:
    """The configuration that a command line asks for: the preset's, changed by the flags.

    `--help` prints what can be set, `--help GROUP` one group of it, and exits with status 0.

    Raises:
        ValueError: an unknown preset, flag or choice (each with the nearest one), a value too few, too many or of the
            wrong type, or one that the configuration refuses.
        SystemExit: status 0, after help.
    """
    named = bool(argv) and not argv[0].startswith("-")
    config = preset(argv[0] if named else DEFAULT)
    return parse_flags(argv[1:] if named else argv, config, program=program, presets=True)


def parse_flags(argv: list[str], config: Config, *, program: str, presets: bool = False) -> Config:
    """`config`, changed by `--group.field VALUE …`; help (with `presets`, of these too) and errors as `parse_train`."""
    for word in _HELP:
        if word in argv:
            print_help(program, config, _help_group(argv[argv.index(word) + 1 :]), presets=presets)
            raise SystemExit(0)
    for flag, words in _by_flag(argv):
        _check(flag, words)
    return _parse(argv, config, program)


def _help_group(following: list[str]) -> str | None:
    """The group named after `--help`, if any."""
    if not following or following[0].startswith("-"):
        return None
    if following[0] not in groups():
        hint = nearest(following[0], groups())
        raise ValueError(f"--help takes one of {', '.join(groups())}, got {following[0]!r}{hint}")
    return following[0]


def _by_flag(argv: list[str]) -> Iterator[tuple[Flag, list[str]]]:
    """Every flag of the command line with the words that follow it."""
    known = {name: flag for flag in flags() for name in (flag.name, flag.negative) if name}
    if argv and not argv[0].startswith("--"):
        raise ValueError(f"expected a flag, got {argv[0]!r}")
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, end in pairwise([*starts, len(argv)]):
        name, assigned, value = argv[start].partition("=")
        flag = known.get(name.replace("_", "-"))
        if flag is None:
            raise ValueError(_unknown_flag(name, list(known)))
        yield flag, ([value] if assigned else []) + argv[start + 1 : end]


def _unknown_flag(name: str, known: list[str]) -> str:
    """Of `--lr` the flag is meant that ends so, of a misspelt one the nearest."""
    if name == "--preset":
        return "the preset has no flag: its name comes first"
    same_field = [candidate for candidate in known if candidate.split(".")[-1] == name.lstrip("-")]
    hint = f"; did you mean {same_field[0]!r}?" if same_field else nearest(name, known)
    return f"there is no flag {name}{hint or '; --help lists them'}"


def _check(flag: Flag, words: list[str]) -> None:
    """Refuse what tyro would refuse, in one sentence that also names what was probably meant."""
    if flag.kind is bool and words:
        raise ValueError(f"{flag.name} takes no value, got {words[0]!r}; {flag.negative} switches it off")
    if flag.optional and words == ["None"]:
        return
    if flag.num_words not in (None, len(words)):
        plural = "values" if flag.num_words > 1 else "value"
        surplus = "; the preset comes first" if words and words[-1] in PRESETS else ""
        raise ValueError(f"{flag.name} takes {flag.num_words} {plural}, got {' '.join(words) or 'none'}{surplus}")
    for word in words:
        if flag.choices and word not in flag.choices:
            hint = nearest(word, flag.choices)
            raise ValueError(f"{flag.name} must be one of {', '.join(flag.choices)}, got {word!r}{hint}")
        if flag.element in _NUMBERS:
            _check_number(flag, word)


def _check_number(flag: Flag, word: str) -> None:
    try:
        flag.element(word)
    except ValueError:
        raise ValueError(f"{flag.name} must be {_NUMBERS[flag.element]}, got {word!r}") from None


def _parse(argv: list[str], default: Config, program: str) -> Config:
    """Let tyro read the flags. It boxes what a configuration refuses; that sentence is enough by itself."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Config, prog=program, args=argv, default=default)
    except SystemExit as stop:
        raise ValueError(_refusal(stop) or sentence(said.getvalue())) from None


def _refusal(stop: SystemExit) -> str | None:
    """The message of the `__post_init__` that made tyro stop; such messages begin with their flag."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ValueError):
        cause = cause.__context__
    return str(cause) if cause is not None and str(cause).startswith("--") else None
