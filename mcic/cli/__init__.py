"""The console script `mcic`, and what every command shares: errors a person can act on, no tracebacks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from mcic import __version__
from mcic.suggest import nearest


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: its own, 2 after an error of the user's, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        from mcic.cli.commands import usage

        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mcic {__version__}")
        return 0
    return run("mcic", _dispatch, argv)


def run(program: str, command: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call `command(argv)` and turn how it ends into an exit status.

    What a user can mend (ValueError, OSError) becomes one line on stderr, `program: error: …`, and status 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks λ must not end a run
            stream.reconfigure(errors="replace")
    try:
        return command(argv) or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except (ValueError, OSError) as error:
        if os.environ.get("MCIC_DEBUG") == "1":
            traceback.print_exc()
        print(f"{program}: error: {_sentence(error)}", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int | None:
    from mcic.cli.commands import COMMANDS, load

    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}: expected {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    return load(name)(rest)


def _sentence(error: Exception) -> str:
    """The error's message in one line; of a failed system call, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
