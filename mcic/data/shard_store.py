"""The bytes of shards: local tars where they are, others fetched whole into a folder of bounded size.

A shard that comes through a command or from a URL can only be read from its start. It is fetched when an image of it
is wanted, and goes when others need its room: however large the set, the disk holds no more than the limit and what
is being fetched. All processes of a machine share the folder. What was fetched is compared with what was indexed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

from filelock import FileLock

from mcic.data.shard_index import Place, ShardIndex, index_shard
from mcic.durable import named, sync, write_text

log = logging.getLogger(__name__)

PERMISSION = "MCIC_ALLOW_PIPE"
THREADS = 4
"""shards that are fetched and indexed at a time"""

SHUFFLED_SHARDS = 4
"""in an epoch's order, images of fetched shards stand up to that many shards' worth behind their neighbours"""
SHARDS_AT_HAND = SHUFFLED_SHARDS + 4
"""shards that the disk must hold for that: those whose images are mixed, the next ones, and some that are larger"""

_PROGRESS_SECONDS = 10.0
_STALE_SECONDS = 3600.0
"""what is fetched for longer without a new byte was left behind by a process that was killed"""
_BLOCK = 2**20  # bytes


def is_remote(url: str) -> bool:
    """Whether a shard is a command (`pipe:…`) or a URL rather than a file."""
    return re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", url) is not None


class ShardStore:
    """Reads shards.

    Args:
        urls: of the shards: files, `pipe:` commands, or URLs that webdataset opens.
        folder: for indexes and for what is fetched.
        limit: bytes that fetched shards may take.

    Attributes:
        indexes: one per shard.
        is_far: whether any shard must be fetched.

    Raises:
        ValueError: a shard is not there, cannot be fetched, is compressed, torn or damaged.
    """

    def __init__(self, urls: Sequence[str], *, folder: Path, limit: int) -> None:
        self.urls, self.folder, self.limit = list(urls), folder, limit
        self.is_far = any(map(is_remote, self.urls))
        self._fetching: Thread | None = None
        for url in self.urls:
            _require_readable(url)
        for name in ("index", "fetched"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.indexes = self._index_all()

    def require_room(self) -> None:
        """Raise ValueError where the limit is too low to read in a random order."""
        sizes = [index.size for url, index in zip(self.urls, self.indexes, strict=True) if is_remote(url)]
        needed = min(SHARDS_AT_HAND, len(sizes)) * max(sizes, default=0)
        if self.limit < needed:
            raise ValueError(
                f"--data.shard-cache {self.limit / 2**30:.3g} GiB is too little: a random order needs "
                f"{min(SHARDS_AT_HAND, len(sizes))} shards at hand, {needed / 2**30:.3g} GiB of these"
            )

    def read(self, shard: int, place: Place) -> bytes:
        """Bytes of a shard.

        Raises:
            ValueError: the shard cannot be fetched, or is another than when it was indexed.
        """
        url, index = self.urls[shard], self.indexes[shard]
        with self._fetched(shard, index.stamp) if is_remote(url) else Path(url).open("rb") as file:
            if not is_remote(url) and _stamp(os.fstat(file.fileno())) != index.stamp:
                raise ValueError(f"{url} has changed while it was in use: start again")
            file.seek(place.offset)
            return file.read(place.length)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch shards while others are used; an error shows when the shard is read."""
        missing = [shard for shard in shards if not self._place(shard).exists()]
        if missing and (self._fetching is None or not self._fetching.is_alive()):
            self._fetching = Thread(target=self._try_to_fetch, args=missing[:1], daemon=True)
            self._fetching.start()

    def _try_to_fetch(self, shard: int) -> None:
        with suppress(ValueError, OSError):
            self._fetched(shard, self.indexes[shard].stamp).close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_fetching": None}  # loader processes that are spawned

    def _place(self, shard: int) -> Path:
        return self.folder / "fetched" / f"{_digest(self.urls[shard])}.tar"

    def _fetched(self, shard: int, stamp: str | None) -> BinaryIO:
        """A fetched shard, open; where it is not there it is fetched, and must have that SHA-256 if one is given."""
        url, path = self.urls[shard], self._place(shard)
        try:
            file = path.open("rb")
            os.utime(file.fileno())  # the least recently used one goes first
            return file
        except FileNotFoundError:
            pass
        with FileLock(path.with_suffix(".lock")):
            with suppress(FileNotFoundError):  # of another process, which may have removed it again
                return path.open("rb")
            partial = path.with_suffix(".partial")
            try:
                found = _fetch(url, partial)
                if stamp is not None and found != stamp:
                    raise ValueError(f"{url} has other content than when it was indexed: remove {self._kept(url)} if "
                                     "that is meant; a run that is continued would see other images")  # fmt: skip
                sync(partial)
                file = partial.open("rb")  # before it has a name that another process may remove
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        self._make_room(path)
        return file

    def _make_room(self, newest: Path) -> None:
        """Remove the fetched shards that were not used for longest; who has one open goes on reading it."""
        found, now = [], time.time()
        for path in newest.parent.iterdir():
            with suppress(FileNotFoundError):  # another process made room
                facts = path.stat()
                if path.suffix == ".tar":
                    found.append((path == newest, facts.st_mtime, facts.st_size, path))
                elif path.suffix == ".partial" and now - facts.st_mtime > _STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, _, size, _ in found)
        for is_newest, _, size, path in sorted(found):
            if total <= self.limit or is_newest:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _kept(self, url: str) -> Path:
        return self.folder / "index" / f"{_digest(url)}.json"

    def _index_all(self) -> list[ShardIndex]:
        indexes: list[ShardIndex] = []
        said = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            for index in pool.map(self._index, range(len(self.urls))):
                indexes.append(index)
                if time.monotonic() - said > _PROGRESS_SECONDS:
                    said = time.monotonic()
                    log.info("looked through %d of %d shards", len(indexes), len(self.urls))
        return indexes

    def _index(self, shard: int) -> ShardIndex:
        """From an earlier run, if the shard is the same; ranks wait for the one that makes it."""
        url = self.urls[shard]
        kept = self._kept(url)
        stamp = None if is_remote(url) else _stamp(Path(url).stat())
        with FileLock(kept.with_suffix(".lock")):
            try:
                index = ShardIndex.from_json(kept.read_text(encoding="utf-8"))
                if stamp in (None, index.stamp):
                    return index
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                pass  # none, or none that can be used: it is made anew
            index = self._make_index(shard, stamp)
            write_text(kept, index.to_json())
            return index

    def _make_index(self, shard: int, stamp: str | None) -> ShardIndex:
        url = self.urls[shard]
        with self._fetched(shard, None) if stamp is None else Path(url).open("rb") as file:
            try:
                stamp = stamp or hashlib.file_digest(file, "sha256").hexdigest()
                return index_shard(file, name=shard_name(url), stamp=stamp)
            except ValueError as error:
                if is_remote(url):
                    self._place(shard).unlink(missing_ok=True)  # the next start fetches it anew
                raise ValueError(f"the shard {url} is {error}. It must be written or fetched anew: nobody knows "
                                 "how many images are lost") from error  # fmt: skip


def shard_name(url: str) -> str:
    """What messages and ids call a shard: the last part of its path that ends with .tar, else the end of it all."""
    names = re.findall(r"[^\s/'\"]+\.tar\b", url)
    return names[-1] if names else url[-40:]


def _require_readable(url: str) -> None:
    """Raise ValueError for a shard that cannot be opened, or that may not without permission."""
    if url[:5].lower() == "pipe:" and os.environ.get(PERMISSION) != "1":
        raise ValueError(f"{url[:80]} runs a command on this machine, which the folder of a run may ask for too: set "
                         f"{PERMISSION}=1 in the environment to allow it")  # fmt: skip
    if is_remote(url):
        _opener()
    elif not Path(url).is_file():
        raise ValueError(f"there is no shard {url}")
    elif not url.endswith(".tar"):
        raise ValueError(f"{url} is no .tar: a compressed one is read through a command, pipe:gunzip -c {url}")


def _opener() -> Callable[[str], Any]:
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise ValueError("shards behind a command or a URL need webdataset: pip install webdataset") from error
    return gopen


def _fetch(url: str, target: Path) -> str:
    """Copy a stream to a file; returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with _opener()(url) as stream, target.open("wb") as file:
            while block := stream.read(_BLOCK):
                digest.update(block)
                file.write(block)
    except (OSError, ImportError) as error:  # the latter: of what webdataset uses for that kind of URL
        if getattr(error, "errno", None) and error.filename in (None, str(target)):  # of the disk
            raise named(error, target) from error
        raise ValueError(f"the shard {url} cannot be fetched: {error}") from error
    return digest.hexdigest()


def _stamp(facts: os.stat_result) -> str:
    return f"{facts.st_size} bytes, {facts.st_mtime_ns} ns"


def _digest(url: str) -> str:
    """A file name for a shard: equal URLs, and paths of the same file, share it."""
    name = url if is_remote(url) else os.path.realpath(url)
    return hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()
