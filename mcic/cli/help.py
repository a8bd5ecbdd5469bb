"""`--help` of the training command: every group fits on a screen, and shows the values of the preset."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mcic.cli.flags import Flag, flags, groups
from mcic.config import Config
from mcic.presets import PRESETS

_LEFT = 38  # columns for a flag and what it takes; a longer one wraps


def print_help(program: str, config: Config, group: str | None = None, *, presets: bool = True) -> None:
    """Print usage, presets where one may be named, and the flags of `group` (all groups when None) with the values that
    `config` has."""
    width = min(max(shutil.get_terminal_size((110, 50)).columns, 80), 120)
    console = Console(width=width, highlight=False)
    shown = groups() if group is None else [group]
    if group is None:
        _print_usage(console, program, config, presets)
    for name in shown:
        console.print(f"\n[bold]{name}[/]  [dim]{escape(groups()[name])}[/]")
        console.print(_flag_table(name, config))
    scope = escape(f"{program}{' [PRESET]' * presets} --help GROUP shows one group: {', '.join(groups())}.")
    whose = f"in preset {config.preset}" if presets else "without the flag"
    console.print(f"\n[dim]In brackets: the value {whose}; no bracket: unset. {scope}[/]")


def _print_usage(console: Console, program: str, config: Config, presets: bool) -> None:
    named = " \\[PRESET]" * presets
    console.print(f"usage: [bold]{program}[/]{named} \\[--group.field VALUE …]")
    if not presets:
        return
    console.print("\nTrain a segmentation network from image tags.\n\n[bold]presets[/]")
    table = _grid(18)
    for name, build in PRESETS.items():
        mark = " [dim](shown below)[/]" if name == config.preset else ""
        table.add_row(f"  [cyan]{name}[/]", escape(build.__doc__ or "") + mark)
    console.print(table)


def _flag_table(group: str, config: Config) -> Table:
    table = _grid(_LEFT)
    for flag in flags():
        if flag.group == group:
            table.add_row(_invocation(flag), f"{escape(flag.help)} [dim]{escape(_value(flag, config))}[/]")
    return table


def _invocation(flag: Flag) -> str:
    """The flag and what it takes, over several lines where `_LEFT` columns do not hold it."""
    name = f"  {flag.name}"
    if flag.negative:  # --train.[no-]flip
        name = name.replace(f"--{flag.group}.", f"--{flag.group}.[no-]")
    lines = [flag.metavar]
    if len(f"{name} {flag.metavar}") > _LEFT:
        spaced = flag.metavar.replace("|", "| ")  # textwrap breaks at spaces
        lines = ["", *textwrap.wrap(spaced, _LEFT - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return f"[cyan]{escape(name)}[/] " + escape("\n".join(lines).replace("| ", "|"))


def _value(flag: Flag, config: Config) -> str:
    """What `config` has for the flag, in brackets; nothing where it is unset."""
    value: Any = getattr(getattr(config, flag.group), flag.field)
    if value is None:
        return ""
    if flag.kind is bool:
        return "[on]" if value else "[off]"
    return f"[{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _grid(left: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=left)
    table.add_column()
    return table
