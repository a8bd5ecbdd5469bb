"""What a tar of samples holds: where the images, masks and saliency maps lie in it, and the tags.

A sample is what webdataset takes for one: neighbouring files `<key>.<ending>`, whose key ends at the first dot of the
file's name. Nothing is ever unpacked. Files are read from their place in the tar, so a name with `..` in it leads
nowhere; links, devices and folders are passed over.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

from mcic.data.base import IGNORE
from mcic.data.dropped import Dropped
from mcic.data.images import probe_image, read_map, read_mask
from mcic.data.tags import entry_tags, nfc, split_tags
from mcic.pictures import readable_suffixes
from mcic.untrusted import parse_json, shown

FORMAT = "mcic-shard-3"
"""of the stored index: other rules take another name"""
IMAGES = ("jpg", "jpeg", "png", "webp")
"""endings of images that are looked for first; then whatever Pillow reads"""
MASK, SALIENCY = "mask.png", "saliency.png"
LONGEST_TEXT = 2**20
"""bytes of a file of tags; longer ones are none"""
LONGEST = 2**30
"""bytes of any other file; more are no image, and a header may claim what no memory holds"""

_END = 2**20  # bytes that may stand at the end of a tar and hold nothing: writers fill up to a multiple of something

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # key and ending, as webdataset divides them
_META = re.compile(r"__[^/]*__(/|$)")  # webdataset's own notes


class Place(NamedTuple):
    """Where a file lies in its tar, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image in a tar and what came with it.

    Attributes:
        key: the common start of its files' names.
        member: name of the image's file.
        size: (H, W) in pixels.
        tags: names or numbers of its classes; None: nothing says.
        image, mask, saliency: where they lie.
        largest: the mask's largest value that is not ignore.
    """

    key: str
    member: str
    size: tuple[int, int]
    tags: tuple[str, ...] | None
    image: Place
    mask: Place | None
    saliency: Place | None
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What is in one tar.

    Attributes:
        samples: those whose image can be read, in the tar's order.
        dropped: what is left out.
        size: of the tar, bytes.
        stamp: what changes when the file does: its time in nanoseconds, or the SHA-256 of what was fetched.
    """

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]
    size: int
    stamp: str

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ShardIndex:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` did not write."""
        content = json.loads(text)
        if content.pop("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT}")
        content["samples"] = tuple(map(_sample, content["samples"]))
        content["dropped"] = tuple(Dropped(**{k: str(v) for k, v in entry.items()}) for entry in content["dropped"])
        return cls(**content)


class Member(io.BytesIO):
    """A file of a tar in memory, which messages call by its name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


def index_shard(file: BinaryIO, *, name: str, stamp: str) -> ShardIndex:
    """Look at every sample of an uncompressed tar, decoding it: JPEGs at low resolution.

    A sample that cannot be read is left out, a mask or saliency map without its image.

    Args:
        file: open for reading; not something in memory.
        name: what messages call it.
        stamp: see `ShardIndex`.

    Raises:
        ValueError: the tar is torn or damaged, so that nobody knows how many samples are missing; says where.
        OSError: the file cannot be read.
    """
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    for key, files in itertools.groupby(_files(file), lambda entry: entry[0]):
        members = {}
        for _, ending, member, place in files:
            members.setdefault(ending, (member, place))
        sample = _read(_Group(file, key, members, name), dropped)
        samples += [] if sample is None else [sample]
    size = os.fstat(file.fileno()).st_size
    return ShardIndex(samples=tuple(samples), dropped=tuple(dropped), size=size, stamp=stamp)


def _files(file: BinaryIO) -> Iterator[tuple[str, str, str, Place]]:
    """(key, ending, name, place) of every file that belongs to a sample, in the tar's order."""
    size = os.fstat(file.fileno()).st_size
    last = "its start"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # the next header would be this one again, or one before it
                    raise tarfile.ReadError("a negative size")
                parts = _NAME.fullmatch(member.name)
                if parts is None or not member.isreg() or member.issparse() or _META.match(member.name):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                last = member.name
                yield nfc(parts[1]), parts[2].lower(), last, Place(member.offset_data, member.size)
            _require_end(file, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"torn or damaged behind {shown(last)}: {error}") from error


def _require_end(file: BinaryIO, offset: int) -> None:
    """Raise tarfile.ReadError unless the tar ends there: tarfile takes whatever it cannot read for the end."""
    file.seek(offset)
    rest = file.read(_END + 1)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it lacks the mark of its end")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError("a damaged header")
    if len(rest) > _END or any(rest):
        raise tarfile.ReadError("more follows behind the mark of its end, as where tars were joined")


@dataclass(frozen=True, slots=True)
class _Group:
    """The files of one sample, by their endings."""

    file: BinaryIO
    key: str
    members: dict[str, tuple[str, Place]]
    shard: str

    def place(self, ending: str) -> Place | None:
        return self.members[ending][1] if ending in self.members else None

    def name(self, ending: str) -> str:
        return f"{self.shard}/{self.members[ending][0]}"

    def open(self, ending: str) -> Member:
        _, place = self.members[ending]
        if place.length > LONGEST:
            raise ValueError(f"its .{ending} has more than {LONGEST} bytes")
        self.file.seek(place.offset)
        return Member(self.file.read(place.length), self.name(ending))

    def text(self, ending: str) -> str:
        if self.members[ending][1].length > LONGEST_TEXT:
            raise ValueError(f"its .{ending} has more than {LONGEST_TEXT} bytes")
        return self.open(ending).getvalue().decode("utf-8-sig")


def _read(group: _Group, dropped: list[Dropped]) -> Sample | None:
    """The sample, if its image and what says its tags can be read."""
    endings = [ending for ending in (*IMAGES, *group.members) if ending in group.members]
    image = next((ending for ending in endings if f".{ending}" in readable_suffixes()), None)
    if image is None:
        dropped.append(Dropped("kind", f"{group.shard}/{group.key}", "a sample without an image"))
        return None
    try:
        size, tags = probe_image(group.open(image)).size, _tags(group)
    except ValueError as error:
        dropped.append(Dropped("broken", group.name(image), _cause(error)))
        return None
    mask, largest = _mask(group, size, dropped)
    return Sample(
        key=group.key, member=group.members[image][0], size=size, tags=tags, image=group.place(image),
        mask=mask, saliency=_saliency(group, dropped), largest=largest,
    )  # fmt: skip


def _mask(group: _Group, size: tuple[int, int], dropped: list[Dropped]) -> tuple[Place | None, int]:
    """Where the mask lies, and its largest class."""
    if MASK not in group.members:
        return None, 0
    try:
        mask = read_mask(group.open(MASK))
        if mask.shape != size:
            raise ValueError(f"{mask.shape[1]}×{mask.shape[0]} pixels, its image {size[1]}×{size[0]}")
    except ValueError as error:
        dropped.append(Dropped("mask", group.name(MASK), _cause(error)))
        return None, 0
    return group.place(MASK), int(mask.max(where=mask != IGNORE, initial=0))


def _saliency(group: _Group, dropped: list[Dropped]) -> Place | None:
    if SALIENCY in group.members:
        try:
            read_map(group.open(SALIENCY))
        except ValueError as error:
            dropped.append(Dropped("mask", group.name(SALIENCY), _cause(error)))
            return None
    return group.place(SALIENCY)


def _tags(group: _Group) -> tuple[str, ...] | None:
    """From the first of `.json`, `.cls` and `.txt` that says any: a document with tags in it, or names joined by |."""
    tags = None
    if "json" in group.members:
        where = group.name("json")
        tags = entry_tags(parse_json(group.text("json"), where), where)
    for ending in ("cls", "txt"):
        if tags is None and ending in group.members:
            tags = split_tags(group.text(ending), group.name(ending))
    return None if tags is None else tuple(sorted(tags))


def _sample(fields: dict[str, Any]) -> Sample:
    """From JSON."""
    for name in ("image", "mask", "saliency"):
        fields[name] = None if fields[name] is None else Place(*map(int, fields[name]))
    fields["size"] = tuple(map(int, fields["size"]))
    fields["tags"] = None if fields["tags"] is None else tuple(map(str, fields["tags"]))
    return Sample(**fields)


def _cause(error: ValueError) -> str:
    return " ".join(str(error.__cause__ or error).split())
