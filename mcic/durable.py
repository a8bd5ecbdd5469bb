"""Writing files so that whoever looks later finds the old content or the new one, whole, whatever happened between."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write a file, its line ends as they are, in the place of the one that is there."""
    write_with(path, lambda partial: partial.write_text(text, encoding="utf-8", newline=""))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, which then takes its place; an error leaves nothing.

    Raises:
        OSError: names `path`.
    """
    # The process's number keeps two commands apart that were started on one folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            raise named(error, path) from error
        raise


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed had begun to write with `write_with`, in a folder and those below it."""
    for partial in folder.rglob(".*.partial"):
        if partial.name.split(".")[-2].isdecimal():
            remove(partial)


def named(error: OSError, path: Path) -> OSError:
    """The same error, of `path`."""
    return OSError(error.errno, error.strerror, str(path)) if error.errno else OSError(f"{path}: {error}")


@contextmanager
def optional(path: Path, *, clear: bool = False) -> Iterator[None]:
    """Within it, what a run can do without is written to `path`: where that fails, a warning says so, and no more.

    Args:
        path: file or folder.
        clear: then remove what is there of it, which may be half of something.
    """
    try:
        yield
    except OSError as error:
        if clear:
            remove(path)
        logger.warning("%s was not written (%s): the run goes on without it", path, error.strerror or error)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `target` when all in it is on the disk; after an error nothing is left.

    A `target` that was there is replaced; a kill meanwhile leaves it as `.<name>.old.partial`, and `restore_folder`
    puts it back. The folder that it lies in must be there: one that was removed while a run went on does not come back
    with a part of what was in it.
    """
    partial, old = (target.with_name(f".{target.name}.{ending}") for ending in ("partial", "old.partial"))
    remove(partial)
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if target.exists():
            remove(old)
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException:
        restore_folder(target)
        remove(partial)
        raise
    sync(target.parent)
    remove(old)


def restore_folder(target: Path) -> None:
    """Give a folder its name again that `new_folder` was about to replace when it was killed."""
    with contextlib.suppress(OSError):  # of two that do it one comes second; another has only the right to read
        if not target.exists():
            os.replace(target.with_name(f".{target.name}.old.partial"), target)


def remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
