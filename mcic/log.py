"""What a run says and writes while it goes: `metrics.jsonl`, `evaluations.jsonl`, `tensorboard/`, and the console.

Step i is what is logged after the i-th update, i from 1; epochs count from 0, but the console says "epoch 1" of the
first. Metrics are floats, or None where there is nothing to measure, under keys that name their unit if they have one.
The console knows `loss/total`, `loss/classification`, `loss/segmentation`, `loss/entropy`, `lambda`, `lr`,
`images_per_second` and `memory_gib`; files hold whatever they are given.
JSON has no NaN and no infinity: `null` stands for them too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mcic.durable import named, optional, write_with
from mcic.environment import environment

__all__ = ["JsonLines", "Metrics", "RunLog", "environment", "print_table", "setup_logging"]

Metrics = Mapping[str, float | None]

PLAIN_INTERVAL = 10.0
"""seconds between progress lines where the output is no terminal"""

_LOSS_TERMS = {
    "loss/classification": "cls {:.3f}", "loss/segmentation": "seg {:.3f}", "loss/entropy": "ent {:.3f}",
}  # fmt: skip
_FIGURES = {"lambda": "λ {:.2f}", "lr": "lr {:.2e}", "images_per_second": "{:.1f} images/s", "memory_gib": "{:.2f} GiB"}
_LEVEL_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class RunLog:
    """The records of a run in `folder`; `enabled=False` (ranks above 0) writes and prints nothing.

    With `start_step` 0 the records begin anew. A resumed run gives the step of its checkpoint: what was recorded
    after it is dropped, with a last line that an interruption tore, so every step stands there once. Evaluations are
    kept up to `evaluated_step` (default: the same), those that will not be made again.

    Raises:
        OSError: from any method, `metrics.jsonl` or `evaluations.jsonl` cannot be written. `tensorboard/` can be done
            without: a warning says so once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        total_steps: int,
        start_step: int = 0,
        evaluated_step: int | None = None,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._console = console or _console()
        self._metrics = JsonLines(folder / "metrics.jsonl", last_step=start_step)
        self._evaluations = JsonLines(
            folder / "evaluations.jsonl", last_step=start_step if evaluated_step is None else evaluated_step
        )
        self._curves: Any = None
        self._curves_folder = folder / "tensorboard"
        if tensorboard:
            with optional(self._curves_folder):
                self._curves = _summary_writer(self._curves_folder, start_step)
        self._eta = _Eta(total_steps)
        self._display: _Display = (_Bar if self._console.is_terminal else _Lines)(self._console, total_steps)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, step: int, epoch: int, metrics: Metrics) -> None:
        """Record the figures of one training step and show them."""
        if not self._enabled:
            return
        self._metrics.write(step, epoch, metrics)
        self._plot(step, metrics)
        self._display.step(step, epoch, metrics, self._eta.text(step))

    def evaluation(self, step: int, epoch: int, metrics: Metrics) -> None:
        """Record the scores of the network after `step`; the console shows the mean IoUs."""
        if not self._enabled:
            return
        self._evaluations.write(step, epoch, metrics)
        self._plot(step, metrics)
        scores = (f"{key} {value:.2f}" for key, value in metrics.items() if "miou" in key and value is not None)
        self._display.flush()
        self.message("  ".join([f"epoch {epoch + 1}", f"step {step}", *scores]))

    def sync(self) -> None:
        """Wait until all records are on the disk: a checkpoint must not be ahead of them."""
        if self._enabled:
            self._metrics.sync()
            self._evaluations.sync()

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._enabled:
            _print(self._console, text)

    def table(self, title: str, rows: list[tuple[str, str, str]]) -> None:
        """Print rows of (name, value, remark), as `print_table` does."""
        if self._enabled:
            self._display.close()
            print_table(title, rows, console=self._console)

    def close(self) -> None:
        """Finish the display and the files; more calls do nothing."""
        if not self._enabled:
            return
        self._enabled = False
        self._display.close()
        self._metrics.close()
        self._evaluations.close()
        self._draw(lambda writer: writer.close())

    def _plot(self, step: int, metrics: Metrics) -> None:
        def add(writer: Any) -> None:
            for key, value in metrics.items():
                if value is not None:
                    writer.add_scalar(key, value, step)

        self._draw(add)

    def _draw(self, action: Callable[[Any], None]) -> None:
        """Do something with TensorBoard's writer; after the first failure nothing."""
        if self._curves is not None:
            writer, self._curves = self._curves, None
            with optional(self._curves_folder):
                action(writer)
                self._curves = writer


class JsonLines:
    """A file of one JSON object a line, each with its `step` and `epoch`, that survives interruptions.

    Lines after `last_step` are dropped when it is opened, all of them if that is 0.

    Raises:
        OSError: from any method, it cannot be written; names the file.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        if last_step == 0:
            path.unlink(missing_ok=True)
        elif path.exists():
            _drop_after(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, epoch: int, metrics: Metrics) -> None:
        """Append a line and hand it to the system."""
        values = {key: _finite(value) for key, value in metrics.items()}
        row = {"step": step, "epoch": epoch, **values}
        try:
            self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries the same again
                self._file.close()
            raise named(error, self._path) from error

    def sync(self) -> None:
        """Wait until all lines are on the disk, in a file that is still there."""
        os.fsync(self._file.fileno())
        os.stat(self._path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def print_table(title: str, rows: list[tuple[str, str, str]], *, console: Console | None = None) -> None:
    """Print rows of (name, value, remark) under a title; values are aligned to the right."""
    console = console or _console()
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(justify="right", overflow="fold")
    if any(remark for *_, remark in rows):
        table.add_column(style="dim", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row[: len(table.columns)]))
    console.print(table)


def setup_logging(*, main: bool | None = None) -> None:
    """Show the messages of the logger "mcic" on the console; of other ranks (`main=False`) only warnings.

    `main=None` asks the environment, where torchrun says RANK.
    """
    if main is None:
        main = os.environ.get("RANK", "0") == "0"
    logger = logging.getLogger("mcic")
    logger.handlers = [_ConsoleHandler()]
    logger.setLevel(logging.INFO if main else logging.WARNING)
    logger.propagate = False
    threading.excepthook = _log_failed_thread


class _ConsoleHandler(logging.Handler):
    """Prints through the console that the progress bar lives on, so that neither tears the other."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        _print(_console(), level + self.format(record), style=_LEVEL_STYLES.get(record.levelno, ""))


class _Display(Protocol):
    """Shows the progress of training."""

    def step(self, step: int, epoch: int, metrics: Metrics, eta: str) -> None:
        """Take note of a step."""

    def flush(self) -> None:
        """Show the last step, if it was not shown."""

    def close(self) -> None:
        """Show the last state and leave the console alone; more calls do nothing."""


class _Lines:
    """Plain lines: at most one in `PLAIN_INTERVAL` seconds, and one at the end of every epoch."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._epoch: int | None = None
        self._pending: str | None = None
        self._last = -math.inf

    def step(self, step: int, epoch: int, metrics: Metrics, eta: str) -> None:
        if epoch != self._epoch:
            self.flush()
            self._epoch = epoch
        facts = (f"epoch {epoch + 1}", f"step {step}/{self._total}", *_facts(metrics), f"ETA {eta}")
        self._pending = "  ".join(facts)
        if time.monotonic() - self._last >= PLAIN_INTERVAL or step >= self._total:
            self.flush()

    def flush(self) -> None:
        if self._pending is not None:
            _print(self._console, self._pending)
            self._pending = None
            self._last = time.monotonic()

    def close(self) -> None:
        self.flush()


class _Bar:
    """A progress bar with the figures of the last step below it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("ETA {task.fields[eta]}"))  # fmt: skip
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=total_steps, epoch=1, eta=_UNKNOWN)
        self._facts = Text(no_wrap=False)
        self._live = Live(Group(self._progress, self._facts), console=console, refresh_per_second=4)

    def step(self, step: int, epoch: int, metrics: Metrics, eta: str) -> None:
        self._progress.update(self._task, completed=step, epoch=epoch + 1, eta=eta)
        self._facts.plain = "  ".join(_facts(metrics))
        self._live.start()  # at the first step, so that preparations can still use the console; later it does nothing

    def flush(self) -> None:
        pass  # the bar always shows the last step

    def close(self) -> None:
        self._live.stop()


_UNKNOWN = "-:--"


class _Eta:
    """Time left, from the mean speed since the first step seen: what came before it was preparation."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None

    def text(self, step: int) -> str:
        """h:mm:ss or m:ss until the last step."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first_step, start = self._first
        if step <= first_step:
            return _UNKNOWN
        minutes, seconds = divmod(round((self._total - step) * (now - start) / (step - first_step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _log_failed_thread(failure: threading.ExceptHookArgs) -> None:
    """Of a file that a helper's thread could not write, a line in the place of a traceback."""
    if isinstance(failure.exc_value, OSError):
        logging.getLogger(__name__).warning("%s", failure.exc_value)
    else:
        threading.__excepthook__(failure)


@cache
def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _print(console: Console, text: str, *, style: str = "") -> None:
    """A line as it is: no markup read from it, not cut where the output is no terminal."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def _facts(metrics: Metrics) -> list[str]:
    """The figures that a person watches, of those that there are."""

    def shown(forms: dict[str, str]) -> list[str]:
        return [form.format(metrics[key]) for key, form in forms.items() if metrics.get(key) is not None]

    terms = ", ".join(shown(_LOSS_TERMS))
    loss = [f"{total} ({terms})" if terms else total for total in shown({"loss/total": "loss {:.3f}"})]
    return loss + shown(_FIGURES)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _drop_after(path: Path, last_step: int) -> None:
    """Rewrite a file of JSON lines without the steps after `last_step` and without what is no line of JSON."""
    with path.open("rb") as old:
        kept = [line for line in old if _step_of(line) <= last_step]
    write_with(path, lambda partial: partial.write_bytes(b"".join(kept)))


def _step_of(line: bytes) -> float:
    """The step of a line, infinite where an interruption tore it."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _summary_writer(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=start_step + 1)
