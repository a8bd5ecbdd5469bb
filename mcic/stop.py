"""Stopping a run from outside without losing a step."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

EXIT_CODE = 75
"""of a run that was asked to stop and saved everything: EX_TEMPFAIL, try again later"""


class Stopped(SystemExit):
    """A run ended early, after saving; its exit status is `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Within its context, SIGTERM, SIGUSR1 and a first Ctrl-C only set `made`; a second Ctrl-C interrupts at once."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.made = True
        if os.environ.get("RANK", "0") == "0":
            # Not through the log: it may be in the middle of a line, and must not be entered twice.
            with contextlib.suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: finishing the step and saving\n".encode())
