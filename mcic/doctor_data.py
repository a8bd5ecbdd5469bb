"""What deserves a look in a folder of photographs and tags; nothing here needs the network."""

from __future__ import annotations

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mcic.data.dropped import DROPPED, Dropped
from mcic.data.folder import Contents
from mcic.data.images import read_thumbnail
from mcic.data.photos import THREADS, Photo
from mcic.untrusted import printable

RARE = 10
"""training images below which a class is called rare: the memory then holds almost nothing of it"""
EVERYWHERE = 0.95
"""share of the training images from which a class tells images no longer apart"""
TINY_SIDE, HUGE_PIXELS = 64, 40_000_000
"""pixels of the shorter side, and of the whole image, beyond which an image is named"""
ALIKE = 0.85
"""`difflib` ratio from which two class names may be one name spelt twice; of names of 4 letters or more"""
NEAR = 6.0
"""root mean square difference, of 255, up to which two thumbnails show one picture: copies that were scaled and saved
as JPEG anew measured up to 4.5, different photographs from 12"""

_SIDE = 16  # of the thumbnails
_BLOCK = 1024  # thumbnails compared with all others at a time


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: a word for it that does not change, e.g. `rare`.
        level: `drop`: something is left out; `look`: deserves a look; `note`: good to know.
        text: what was found and what to do, to be read behind the number of names.
        names: the classes or files, all of them.
    """

    kind: str
    level: Literal["drop", "look", "note"]
    text: str
    names: tuple[str, ...]


def findings(contents: Contents, root: Path) -> list[Finding]:
    """Everything that is found, what is left out first; reads every image once more for duplicates."""
    return [
        *_dropped(contents.dropped, root),
        *_class_findings(contents),
        *_name_findings(contents.classes),
        *_image_findings([*contents.train, *contents.val], root),
        *_duplicate_findings(contents, root),
    ]


def _dropped(dropped: Sequence[Dropped], root: Path) -> list[Finding]:
    found = []
    for kind, words in DROPPED.items():
        names = [f"{_relative(entry.name, root)}{f': {printable(entry.reason)}' if entry.reason else ''}"
                 for entry in dropped if entry.kind == kind]  # fmt: skip
        if names:
            found.append(Finding(f"dropped-{kind}", "drop", f"{words}: left out", tuple(names)))
    return found


def _class_findings(contents: Contents) -> list[Finding]:
    train = {name: {photo.id for photo in contents.train if name in photo.tags} for name in contents.classes}
    shown = {tag for photo in contents.val for tag in photo.tags}
    total = len(contents.train)
    found = []
    if rare := [name for name, ids in train.items() if len(ids) < RARE]:
        text = f"classes in fewer than {RARE} training images: add images, or take the tag away"
        found.append(Finding("rare", "look", text, tuple(f"{name} ({len(train[name])})" for name in rare)))
    if everywhere := [name for name, ids in train.items() if ids and len(ids) >= EVERYWHERE * total]:
        text = ("classes in (almost) every training image: they cannot be learnt from tags, which do not tell them "
                "from background; add images without them (an empty list of tags is allowed)")  # fmt: skip
        names = (f"{name} ({len(train[name])} of {total})" for name in everywhere)
        found.append(Finding("everywhere", "look", text, tuple(names)))
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for name, ids in train.items():
        if ids:
            groups[frozenset(ids)].append(name)
    if together := [" + ".join(names) for names in groups.values() if len(names) > 1]:
        text = ("groups of classes that always come together: nothing tells them apart; "
                "add images with one of them alone, or make them one class")  # fmt: skip
        found.append(Finding("together", "look", text, tuple(together)))
    if unseen := [name for name in contents.classes if name not in shown]:
        text = "classes in no validation image: their quality will not be measured"
        found.append(Finding("unmeasured", "note", text, tuple(unseen)))
    if untagged := [printable(photo.name) for photo in (*contents.train, *contents.val) if not photo.tags]:
        text = "images with an empty list of tags: they teach what background looks like"
        found.append(Finding("untagged", "note", text, tuple(untagged)))
    return found


def _name_findings(classes: Iterable[str]) -> list[Finding]:
    alike = tuple(f"{first} / {second}" for first, second in combinations(classes, 2) if _same_name(first, second))
    if not alike:
        return []
    text = "pairs of class names that may be one class spelt twice: if so, give both one name"
    return [Finding("names", "look", text, alike)]


def _same_name(first: str, second: str) -> bool:
    """Equal but for case, spaces, hyphens, plural, or a letter or two; names that differ in a number are not."""
    first, second = ("".join(letter for letter in name.casefold() if letter not in " _-") for name in (first, second))
    if _singulars(first) & _singulars(second):
        return True
    digits = [[letter for letter in name if letter.isdigit()] for name in (first, second)]
    long = min(len(first), len(second)) >= 4
    return long and digits[0] == digits[1] and difflib.SequenceMatcher(None, first, second).ratio() >= ALIKE


def _singulars(name: str) -> set[str]:
    """The name and what it may be the English plural of."""
    endings = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("men", "man"))
    found = {name.removesuffix(many) + one for many, one in endings if name.endswith(many)}
    return {name} | {singular for singular in found if len(singular) >= 3}


_ODDITIES: dict[str, tuple[Literal["look", "note"], str]] = {
    "animated": ("look", "animations or files of several pages: only the first is used"),
    "CMYK": ("look", "CMYK images: converted without their colour profile; save them as sRGB if colours matter"),
    "16-bit": ("look", "16-bit images: the full range becomes 0…255; stretch dark ones before"),
    "transparent": ("look", "transparent images: laid over white, which then is their background"),
    "rotated": ("note", "images that EXIF turns: read as a person sees them, and so must be their masks"),
    "ending": ("note", "images whose ending names another format: read by their content"),
}


def _image_findings(photos: Sequence[Photo], root: Path) -> list[Finding]:
    found = []
    for oddity, (level, text) in _ODDITIES.items():
        if names := tuple(_relative(photo.path, root) for photo in photos if oddity in photo.facts.oddities):
            found.append(Finding(oddity, level, text, names))
    sizes = {photo: photo.facts.size for photo in photos}
    extremes = (
        ("tiny", {photo for photo, size in sizes.items() if min(size) < TINY_SIDE},
         f"images of less than {TINY_SIDE} pixels on a side: there is little to see in them"),
        ("huge", {photo for photo, size in sizes.items() if size[0] * size[1] > HUGE_PIXELS},
         f"images of more than {HUGE_PIXELS // 10**6} megapixels: every epoch decodes them; smaller copies are faster"),
    )  # fmt: skip
    for kind, chosen, text in extremes:
        if names := tuple(f"{_relative(photo.path, root)} ({size[1]}×{size[0]})" for photo, size in sizes.items()
                          if photo in chosen):  # fmt: skip
            found.append(Finding(kind, "look", text, names))
    return found


def _duplicate_findings(contents: Contents, root: Path) -> list[Finding]:
    """Equal files and pictures that look the same, in one split or, which is worse, in both."""
    photos = [*contents.train, *contents.val]
    with ThreadPoolExecutor(THREADS) as pool:
        prints = list(pool.map(_fingerprint, photos))
    same = _groups([digest for digest, _ in prints])
    near = _near_groups(np.stack([thumbnail for _, thumbnail in prints]))
    leaks, copies, similar, conflicts = [], [], [], []
    for group in {tuple(group) for group in (*same, *near)}:
        names = " = ".join(_relative(photos[i].path, root) for i in group)
        if group[0] < len(contents.train) <= group[-1]:
            leaks.append(names)
        else:
            (copies if list(group) in same else similar).append(names)
        if list(group) in same and len({photos[i].tags for i in group}) > 1:
            conflicts.append(names)
    mend = "make a val/ of your own" if contents.held_out else "keep each in one of them"
    texts = (
        ("leak", leaks, f"pictures in both train and val, where they flatter the figures: {mend}"),
        ("conflict", conflicts, "equal images with different tags: correct them"),
        ("duplicate", copies, "images that are there more than once: keep one"),
        ("similar", similar, "groups of images that look the same: keep one, or make sure they differ"),
    )
    return [Finding(kind, "look", text, tuple(sorted(names))) for kind, names, text in texts if names]


def _fingerprint(photo: Photo) -> tuple[bytes, np.ndarray]:
    """Digest of the file, and its thumbnail uint8 [side, side, 3]."""
    with photo.path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").digest()
    return digest, read_thumbnail(photo.path, _SIDE)


def _groups(keys: Sequence[object]) -> list[list[int]]:
    """Places of equal keys, where there are two or more."""
    places: dict[object, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return [group for group in places.values() if len(group) > 1]


def _near_groups(thumbnails: np.ndarray) -> list[list[int]]:
    """Groups of thumbnails [n, side, side, 3] that chains of near pairs connect."""
    rows = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    squares = (rows**2).sum(1)
    component = np.arange(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = squares[block, None] + squares[None] - 2 * rows[block] @ rows.T  # [block, n]
        first, second = np.nonzero(distances <= NEAR**2 * rows.shape[1])
        # One graph of the components so far and this block's pairs: memory for all pairs would grow with n².
        places = (component[first + start], component[second])
        graph = coo_array((np.ones(len(first), bool), places), shape=(len(rows), len(rows)))
        component = connected_components(graph, directed=False)[1][component]
    return _groups(component.tolist())


def _relative(name: str | Path, root: Path) -> str:
    path = Path(name)
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(name))
