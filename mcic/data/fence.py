"""Which files of a data folder may be read: no link leads out of it unless that is allowed, no pipe is waited for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mcic.data.dropped import Dropped
from mcic.untrusted import shown

_LITTER = {"__MACOSX", "__pycache__"}


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are passed over: hidden ones, and what zips and Python leave behind."""
    return name.startswith(".") or name in _LITTER


@dataclass(frozen=True, slots=True)
class Fence:
    """The folder that the files of a data set must lie in.

    Attributes:
        root: the folder, without links in its path.
        follow_links: whether links may lead out of it (`--data.follow-links`).
    """

    root: Path
    follow_links: bool = False

    @classmethod
    def around(cls, root: str | Path, *, follow_links: bool = False) -> Fence:
        return cls(Path(os.path.realpath(Path(root).expanduser())), follow_links)

    def require(self, path: Path) -> Path:
        """`path`; raises ValueError where it or a folder above it is a link that leads nowhere or out of the root."""
        if reason := self._reason(path):
            raise ValueError(f"{path} {reason}")
        return path

    def require_files(self, folder: Path, names: Iterable[str], what: str) -> None:
        """Raise ValueError unless every name is that of a file in `folder` that has content; none is opened."""
        lacking = [(name, reason) for name in names if (reason := self._flaw(folder / name))]
        if lacking:
            name, reason = lacking[0]
            raise ValueError(f"{folder} lacks {len(lacking)} listed {what}, first {shown(name)} ({reason})")

    def files(self, folder: Path) -> tuple[list[Path], list[Dropped]]:
        """All files at any depth in the order of their paths, and what is none or is out of bounds; no hidden ones.

        Links to folders are followed only out of the root, where that is allowed: within it, what they lead to is
        found anyway.
        """
        files: list[Path] = []
        dropped: list[Dropped] = []
        top = os.path.realpath(folder)
        waiting, seen = [folder], {top}
        while waiting:
            here = waiting.pop()
            try:
                names = os.listdir(here)
            except OSError as error:
                dropped.append(Dropped("closed", str(here), error.strerror or "it cannot be opened"))
                continue
            for path in (here / name for name in names if not is_hidden(name)):
                if reason := self._reason(path) if path.is_symlink() else "":
                    dropped.append(Dropped("link", str(path), reason))
                elif path.is_file():
                    files.append(path)
                elif not path.is_dir():
                    dropped.append(Dropped("special", str(path), "no file"))
                elif not path.is_symlink():
                    waiting.append(path)
                elif self._holds(target := os.path.realpath(path)) and not Path(target).is_relative_to(top):
                    reason = f"is not followed: {target} lies within the data, and counts there or not at all"
                    dropped.append(Dropped("link", str(path), reason))
                elif self._holds(target) or target in seen:
                    dropped.append(Dropped("link", str(path), "leads to a folder that is read anyway"))
                else:
                    seen.add(target)
                    waiting.append(path)
        return sorted(files), sorted(dropped, key=lambda entry: entry.name)

    def _flaw(self, path: Path) -> str:
        """Why a file cannot be read without looking into it; "" if nothing is known."""
        try:
            state = os.lstat(path)
            if stat.S_ISLNK(state.st_mode):
                if reason := self._reason(path):
                    return reason
                state = os.stat(path)
        except (OSError, ValueError) as error:  # of a name that no file can have
            return getattr(error, "strerror", None) or "it cannot be opened"
        return "no file" if not stat.S_ISREG(state.st_mode) else "empty" if state.st_size == 0 else ""

    def _reason(self, path: Path) -> str:
        """Why a path may not be followed; "" if it may."""
        target = os.path.realpath(path)
        try:
            os.stat(target)
        except OSError as error:
            return f"leads nowhere ({error.strerror})" if path.is_symlink() else ""
        if self.follow_links or self._holds(target):
            return ""
        return f"leads out of {self.root}, to {target}: --data.follow-links allows it"

    def _holds(self, target: str) -> bool:
        return Path(target).is_relative_to(self.root)
