"""Names of images: which one a row of a table means, and what the files of an image are called.

A key is an image's path below its folder, with / between its parts (`mcic.data.tags.key_of`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from mcic.data.names import is_text
from mcic.data.tags import Row
from mcic.pictures import readable_suffixes
from mcic.untrusted import shown


class ImageNames:
    """Finds the image that a row means: the one that it names exactly, or by the strictest of `RULES` that fits any."""

    RULES: tuple[Callable[[str, str], bool], ...] = (
        lambda name, key: _bare(name) == _bare(key),
        lambda name, key: _same_end(_bare(name).casefold().split("/"), _bare(key).casefold().split("/")),
    )

    def __init__(self, keys: Iterable[str], *, named: Iterable[str]) -> None:
        """
        Args:
            keys: of all images.
            named: of those that rows name exactly. Another row fits them only as a second spelling, in another case or
                without its ending: the x.jpg of a table that has x.png is a file that is missing.
        """
        self._named = set(named)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            self._by_name[self._last(key)].append(key)

    def find(self, row: Row) -> str | None:
        """The key of an image, None if there is none; raises ValueError where several fit equally."""
        alike = self._by_name.get(self._last(row.image), [])
        if row.image in alike:
            return row.image
        for rule in self.RULES:
            found = [key for key in alike if rule(row.image, key)]
            if found and self._named.issuperset(found) and not any(_same_file(row.image, key) for key in found):
                return None
            if len(found) > 1:
                raise ValueError(f"{row.where}: {shown(row.image)!r} may be {found[0]} or {found[1]}: write the whole "
                                 "path, with its ending")  # fmt: skip
            if found:
                return found[0]
        return None

    @staticmethod
    def _last(name: str) -> str:
        return PurePosixPath(_bare(name)).name.casefold()


def _bare(name: str) -> str:
    """A name without the ending of an image, where it has one."""
    return PurePosixPath(name).with_suffix("").as_posix() if _ending(name) else name


def _ending(name: str) -> str:
    """The ending of an image, in lower case; empty where the name has none."""
    ending = PurePosixPath(name).suffix.lower()
    return ending if ending in readable_suffixes() else ""


def _same_file(name: str, key: str) -> bool:
    """Whether a name may be a second spelling of a key."""
    return _bare(name).casefold() == _bare(key).casefold() and _ending(name) in ("", _ending(key))


def _same_end(first: list[str], second: list[str]) -> bool:
    """Whether one path is the end of the other."""
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


def file_name(name: str) -> str:
    """The name as that of one file: of at most 200 bytes, so that an ending fits behind it, and text in UTF-8."""
    flat = name.replace("/", "__")
    if len(name_bytes(flat)) <= 200 and is_text(flat):
        return flat
    start = "".join(filter(is_text, name_bytes(flat)[:180].decode(errors="ignore")))
    return f"{start}-{hashlib.blake2b(name_bytes(name), digest_size=6).hexdigest()}"


def name_bytes(text: str) -> bytes:
    """In UTF-8; of a file name that is no text, the bytes that it has."""
    return text.encode(errors="surrogateescape")


def stem_of(key: str) -> str:
    """A key without its ending."""
    return PurePosixPath(key).with_suffix("").as_posix()
