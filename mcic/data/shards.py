"""Tagged images in tars, as webdataset writes them: for sets that are too large for single files, or for the disk.

A sample is `<key>.jpg` with its tags beside it in `<key>.json`, `.cls` or `.txt`, and on request `<key>.mask.png` and
`<key>.saliency.png`; see `mcic.data.shard_index`. Every tar is looked through once, and where its files lie is kept.
From then on the set is as any other: each image has its place, so that order, resuming, ranks and commands are those
of files. Shards behind commands and URLs are fetched one by one into a folder of bounded size; an epoch then mixes
neighbouring shards instead of the whole set.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from mcic.data.base import Dataset, Splits
from mcic.data.dropped import Dropped, describe, require_few
from mcic.data.folder import VAL_FOLDERS
from mcic.data.images import read_image, read_map, read_mask
from mcic.data.names import check_classes, is_text, tag_matrix
from mcic.data.palette import voc_palette
from mcic.data.shard_index import Member, Place, Sample
from mcic.data.shard_store import SHUFFLED_SHARDS, ShardStore, is_remote, shard_name
from mcic.data.tags import spelt
from mcic.pictures import readable_suffixes
from mcic.suggest import nearest
from mcic.untrusted import read_text, shown

log = logging.getLogger(__name__)

PREDICTED_LIMIT = 20 * 2**30
"""bytes of fetched shards where no `--data.shard-cache` says it"""
LAYOUT = (
    "a folder with .tar files, directly or in train/ and val/; a pattern such as 'shards/train-*.tar' or "
    "'shards/train-{000..099}.tar'; or commands and URLs, 'pipe:aws s3 cp s3://bucket/train-{000..099}.tar -'"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample and the number of its shard."""

    shard: int
    sample: Sample


class Shards(Dataset):
    """Tagged images in tars; `Shards.splits` finds them.

    Attributes:
        entries: one record per image.
    """

    name = "shards"

    def __init__(
        self, store: ShardStore, entries: Sequence[Entry], *, classes: tuple[str, ...], dropped: Sequence[Dropped] = ()
    ) -> None:
        self.store, self.entries, self.classes, self.dropped = store, list(entries), classes, tuple(dropped)
        self.palette = voc_palette(len(classes) + 1)
        self.ids = [_id(entry.sample.key) for entry in self.entries]
        places = {tag: place for place, tag in enumerate(classes)}
        self.tags = tag_matrix([{places[tag] for tag in e.sample.tags or ()} for e in self.entries], len(classes))
        self._place_in_shards()

    def image(self, index: int) -> np.ndarray:
        return _read_image(self.store, self.entries[index].shard, self.entries[index].sample)

    def mask(self, index: int) -> np.ndarray | None:
        place = self.entries[index].sample.mask
        return None if place is None else read_mask(self._member(index, place))

    def has_mask(self, index: int) -> bool:
        return self.entries[index].sample.mask is not None

    def saliency(self, index: int) -> np.ndarray | None:
        place = self.entries[index].sample.saliency
        return None if place is None else read_map(self._member(index, place))

    def size(self, index: int) -> tuple[int, int]:
        return self.entries[index].sample.size

    @property
    def stored(self) -> bool:
        return True

    def shuffled(self, random: np.random.Generator) -> np.ndarray:
        """As of any set; where shards are fetched, in an order that needs only few of them at a time.

        The shards follow each other in a random order, and each image falls back by a random distance of up to
        `SHUFFLED_SHARDS` shards of middling size.
        """
        if not self.store.is_far:
            return super().shuffled(random)
        rank = random.permutation(len(self.store.urls))
        in_shards = np.argsort(rank[self._shards], kind="stable")
        places = np.arange(len(self)) + random.uniform(0, SHUFFLED_SHARDS * self._images_per_shard, len(self))
        return in_shards[np.argsort(places, kind="stable")]

    def will_read(self, indices: np.ndarray) -> None:
        if self.store.is_far:
            soon = self._shards[indices[: 2 * self._images_per_shard]]
            self.store.fetch_ahead(list(dict.fromkeys(soon.tolist())))

    def subset(self, count: int | None) -> None:
        """As of any set; where shards are fetched, of few shards."""
        if count is not None and count < len(self) and self.store.is_far:
            shards, sizes = np.unique(self._shards, return_counts=True)
            number = next(
                n for n in range(1, len(shards) + 1)
                if sizes[_spread(n, len(shards))].sum() >= count and (n >= SHUFFLED_SHARDS or n == len(shards))
            )  # fmt: skip
            self._keep(np.flatnonzero(np.isin(self._shards, shards[_spread(number, len(shards))])))
        super().subset(count)

    def _keep(self, indices: np.ndarray) -> None:
        super()._keep(indices)
        self.entries = [self.entries[index] for index in indices]
        self._place_in_shards()

    def _place_in_shards(self) -> None:
        self._shards = np.array([entry.shard for entry in self.entries], np.int64)  # [len(self)]
        self._images_per_shard = max(1, len(self.entries) // max(1, len(np.unique(self._shards))))

    def _member(self, index: int, place: Place) -> Member:
        entry = self.entries[index]
        return Member(self.store.read(entry.shard, place), f"what came with image {entry.sample.member}")

    @classmethod
    def splits(
        cls, root: str, *, val_root: str | None, val_share: float, max_bad_share: float, folder: Path, limit: int
    ) -> Splits:
        """Both splits of a sharded set; what is left out is said in one warning.

        Classes are the lines of a local `classes.txt`, in the folder of the shards or above it: line i, from 1, is mask
        value i, and a tag that is a number n is line n + 1. Without that file they are the tags in alphabetical order.
        Without validation shards about `val_share` (0…1) of the shards is held out, chosen by their names.

        Args:
            root, val_root: see `LAYOUT`.
            val_share: used where there are no validation shards.
            max_bad_share: of the images, 0…1, that may be unusable.
            folder, limit: see `ShardStore`.

        Raises:
            ValueError: no shards, or unusable ones; too many unusable images; a key that comes twice, an unknown tag,
                or a mask with values that are no class.
        """
        train, val = _parts(root, val_root, val_share)
        store = ShardStore([*train, *val], folder=folder, limit=limit)
        store.require_room()
        for url, index in zip(store.urls, store.indexes, strict=True):
            if not index.samples:
                reason = f": {index.dropped[0].reason}" if index.dropped else ""
                raise ValueError(f"the shard {url} holds no image that can be read{reason}")
        dropped = [entry for index in store.indexes for entry in index.dropped]
        found = [Entry(shard, sample) for shard, index in enumerate(store.indexes) for sample in index.samples]
        require_few(dropped, usable=len(found), share=max_bad_share)
        tagged = [entry for entry in found if entry.sample.tags is not None]
        dropped += [Dropped("image", entry.sample.member) for entry in found if entry.sample.tags is None]
        for where, sides in (("--data.root", range(len(train))), ("val", range(len(train), len(store.urls)))):
            if not any(entry.shard in sides for entry in tagged):
                raise ValueError(f"no image in the shards of {where} has tags: expected .json, .cls or .txt in "
                                 f"{store.urls[sides[0]]} and its like")  # fmt: skip
        classes, tagged = _named(tagged, store)
        _check(tagged, classes, store)
        if said := describe(dropped):
            log.warning("%s: %s left out", root, said)
        parts = ([e for e in tagged if (e.shard < len(train)) == is_train] for is_train in (True, False))
        return Splits(*(cls(store, part, classes=classes, dropped=dropped) for part in parts))


def store_folder(cache: str | None) -> Path:
    """Where indexes and fetched shards lie: below `--data.cache`, or the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mcic"
    return (Path(cache) if cache else user) / "shards"


def names_shards(root: str) -> bool:
    """Whether a data root stands for tars rather than for a folder of images."""
    folder = Path(root).expanduser()
    if is_remote(root) or root.endswith(".tar") or ("::" in root and not folder.exists()):
        return True
    return _holds_tars(folder) or _holds_tars(folder / "train")


def _holds_tars(folder: Path) -> bool:
    """Whether a folder has tars in it, and no images there or below, as far as `train/images/`: it stands for those."""
    if next(folder.glob("*.tar"), None) is None:
        return False
    found = (path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern))
    return not any(path.suffix.lower() in readable_suffixes() for path in found)


def shards_of(root: str) -> list[str]:
    """The shards that a folder, a pattern or a list with `::` between its parts stands for, each once, in order.

    Raises:
        ValueError: there are none, or braces are used and webdataset is not there to expand them.
    """
    if Path(root).expanduser().is_dir():
        return sorted(map(str, Path(root).expanduser().glob("*.tar")))
    specs = [root]
    if "{" in root or "::" in root:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ValueError("{…} and :: in a list of shards need webdataset (pip install webdataset), or name their "
                             "folder, or a pattern with *") from error  # fmt: skip
        specs = [each for part in root.split("::") for each in braceexpand(part)]
    found: dict[str, None] = {}
    for spec in specs:
        here = spec if is_remote(spec) else os.path.expanduser(spec)
        matches = sorted(glob.glob(here)) if not is_remote(here) and glob.has_magic(here) else [here]
        if not matches:
            raise ValueError(f"there is no shard {spec}: expected {LAYOUT}")
        found |= dict.fromkeys(matches)
    return list(found)


def images_of(root: str) -> Iterator[tuple[str, str, Callable[[], np.ndarray]]]:
    """The images in the shards of `root`, with tags or without: a path for each, a name, and what reads it.

    The name is the key, where that leads into no other folder; else one made of it, and with a number behind it where
    another image has it. What reads an image that is broken raises ValueError. Paths of local shards are absolute.

    Raises:
        ValueError: as `ShardStore` and `shards_of`.
    """
    store = ShardStore(shards_of(root), folder=store_folder(None), limit=PREDICTED_LIMIT)
    for shard, (url, index) in enumerate(zip(store.urls, store.indexes, strict=True)):
        where = url if is_remote(url) else os.path.abspath(url)
        counts: Counter[str] = Counter()
        for sample in index.samples:
            key = sample.key.removeprefix("./")
            leads_out = key.startswith("/") or {"..", "."} & set(key.split("/")) or _id(key) != key.replace("/", "__")
            name = _numbered(_id(key) if leads_out else key, counts)
            yield f"{where}/{name}{Path(sample.member).suffix}", name, partial(_read_image, store, shard, sample)
        for entry in index.dropped:
            if entry.kind == "broken":
                name = _numbered(_id(entry.name), counts)
                yield f"{where}/{name}", name, partial(_refuse, entry)


def _numbered(name: str, counts: Counter[str]) -> str:
    """A name that is not among those counted, which it joins: a key that comes twice is two images."""
    counts[name] += 1
    return name if counts[name] == 1 else _numbered(f"{name}-{counts[name]}", counts)


def _read_image(store: ShardStore, shard: int, sample: Sample) -> np.ndarray:
    name = f"{shard_name(store.urls[shard])}/{sample.member}"
    return read_image(Member(store.read(shard, sample.image), name))


def _refuse(entry: Dropped) -> NoReturn:
    raise ValueError(f"{entry.name}: {entry.reason}")


def _parts(root: str, val_root: str | None, share: float) -> tuple[list[str], list[str]]:
    """The shards of train and of val, neither of them empty."""
    folder = Path(root).expanduser()
    train_root = str(folder / "train") if _holds_tars(folder / "train") else root
    if val_root is None:
        val_root = next((str(folder / name) for name in VAL_FOLDERS if _holds_tars(folder / name)), None)
    train = shards_of(train_root)
    if val_root is not None:
        val = shards_of(val_root)
        if not val:
            raise ValueError(f"--data.val-root {val_root} holds no .tar: expected {LAYOUT}")
        if both := sorted(set(train) & set(val)):
            raise ValueError(f"{both[0]} is in --data.root and in --data.val-root")
        return train, val
    if len(train) < 2:
        raise ValueError(f"{root} is a single shard, and none is left to hold out: name others with --data.val-root")
    by_name = len({*map(os.path.basename, train)}) > 1  # not all in folders of their own, of one name
    fractions = {url: _fraction(os.path.basename(url) if by_name else url) for url in train}
    low, *_, high = sorted(fractions.values())
    border = min(max(share, np.nextafter(low, 1)), high)
    return [u for u in train if fractions[u] >= border], [u for u in train if fractions[u] < border]


def _fraction(name: str) -> float:
    """A number in 0…1 that depends on nothing but the shard's name: it stays on its side when others are added."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=6).digest()) / 2**48


def _named(entries: Iterable[Entry], store: ShardStore) -> tuple[tuple[str, ...], list[Entry]]:
    """The classes, and the entries with names for tags that are numbers."""
    folders = [Path(url).parent for url in store.urls if not is_remote(url)]
    files = (folder / "classes.txt" for here in folders for folder in (here, here.parent))
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        tags = {tag for entry in entries for tag in entry.sample.tags}
        ordered = sorted(tags, key=lambda tag: (int(tag) if tag.isdecimal() else -1, tag))
        return check_classes(ordered, source="what the shards say of their images"), list(entries)
    classes = check_classes([spelt(line, file) for line in read_text(file).rstrip().splitlines()], source=file)

    def name(tag: str, entry: Entry) -> str:
        if tag in classes:
            return tag
        if tag.isdecimal() and int(tag) < len(classes):
            return classes[int(tag)]
        raise ValueError(f"image {shown(entry.sample.member)} of {store.urls[entry.shard]} has the tag {shown(tag)!r}, "
                         f"which is not in {file}{nearest(tag, classes)}")  # fmt: skip

    return classes, [
        replace(entry, sample=replace(entry.sample, tags=tuple(name(tag, entry) for tag in entry.sample.tags)))
        for entry in entries
    ]


def _check(entries: Sequence[Entry], classes: tuple[str, ...], store: ShardStore) -> None:
    """Raise ValueError where a key comes twice or a mask holds a value that is no class."""
    seen: dict[str, int] = {}
    for entry in entries:
        name = _id(entry.sample.key)
        if name in seen:
            raise ValueError(
                f"the key {shown(entry.sample.key)!r} is in {store.urls[entry.shard]} and before it in "
                f"{store.urls[seen[name]]}: every image needs one of its own"
            )
        seen[name] = entry.shard
        if entry.sample.largest > len(classes):
            raise ValueError(
                f"the mask of image {shown(entry.sample.member)} in {store.urls[entry.shard]} has the value "
                f"{entry.sample.largest}: expected 0…{len(classes)} or 255 (ignore); classes.txt says which class has "
                "which value"
            )


def _id(key: str) -> str:
    """A key as the name of one file, of at most 200 bytes so that an ending fits behind it, and text in UTF-8."""
    flat = key.removeprefix("./").replace("/", "__")
    if is_text(flat) and len(flat.encode()) <= 200:
        return flat
    return f"image-{hashlib.blake2b(os.fsencode(key), digest_size=8).hexdigest()}"


def _spread(number: int, total: int) -> np.ndarray:
    """`number` places evenly spread over 0…total - 1."""
    return np.linspace(0, total - 1, number).round().astype(int)
