"""A user's own photographs: a folder of images with a table of tags, or one sub-folder per class."""

from __future__ import annotations

import filecmp
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from mcic.data.base import Dataset, Splits
from mcic.data.dropped import Dropped, describe, require_few
from mcic.data.fence import Fence, is_hidden
from mcic.data.image_names import ImageNames, file_name, name_bytes, stem_of
from mcic.data.images import read_image, read_mask
from mcic.data.names import check_classes, tag_matrix
from mcic.data.palette import voc_palette
from mcic.data.photos import Photo, readable
from mcic.data.tags import Row, find_tables, key_of, nfc, read_table, spelt
from mcic.pictures import readable_suffixes
from mcic.suggest import nearest
from mcic.untrusted import read_text, shown

log = logging.getLogger(__name__)

LAYOUT = (
    "images/ and tags.csv (header image,tags; tags joined by |), tags.json, COCO JSON or VOC Annotations/, or one "
    "sub-folder of images per class; either directly or under train/ and val/, which one table in the root may name"
)

IMAGE_FOLDERS = ("images", "Images", "JPEGImages")
VAL_FOLDERS = ("val", "valid", "validation")

_NO_CLASSES = {*IMAGE_FOLDERS, "masks", "annotations", "Annotations", "lost+found"}
_NO_IMAGES = {".csv", ".tsv", ".json", ".jsonl", ".xml", ".txt", ".md", ".ini", ".db", ".yaml", ".yml", ".html"}
"""endings of files that nobody takes for a photograph"""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder holds.

    Attributes:
        train, val: the photographs, in the order of their ids.
        classes: names of the classes.
        dropped: what was left out.
        held_out: whether `val` was split off because the folder has none.
    """

    train: list[Photo]
    val: list[Photo]
    classes: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    held_out: bool


class Folder(Dataset):
    """Photographs and their tags; `Folder.splits` reads them from disk.

    Attributes:
        photos: one record per image.
        contents: what was read with this split: the other one too, and what was left out.
    """

    def __init__(self, photos: Sequence[Photo], contents: Contents, *, name: str) -> None:
        self.name = name
        self.contents = contents
        self.dropped = contents.dropped
        self.classes = contents.classes
        self.palette = voc_palette(len(self.classes) + 1)
        self.photos = list(photos)
        self.ids = [photo.id for photo in photos]
        places = {tag: place for place, tag in enumerate(self.classes)}
        self.tags = tag_matrix([{places[tag] for tag in photo.tags} for photo in photos], len(self.classes))

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def mask(self, index: int) -> np.ndarray | None:
        path = self.photos[index].mask
        return None if path is None else read_mask(path)

    def has_mask(self, index: int) -> bool:
        return self.photos[index].mask is not None

    def path(self, index: int) -> Path:
        return self.photos[index].path

    def _keep(self, indices: np.ndarray) -> None:
        super()._keep(indices)
        self.photos = [self.photos[i] for i in indices]

    @classmethod
    def splits(
        cls, root: str | Path, val_share: float, *, max_bad_share: float = 1.0, follow_links: bool = False
    ) -> Splits:
        """Both splits of a folder; what is left out is said in one warning. See `read_folder`."""
        contents = read_folder(root, val_share, max_bad_share=max_bad_share, follow_links=follow_links)
        name = Path(root).expanduser().resolve().name
        if said := describe(contents.dropped):
            log.warning("%s: %s left out; mcic doctor says more", root, said)
        return Splits(cls(contents.train, contents, name=name), cls(contents.val, contents, name=name))


def read_folder(
    root: str | Path, val_share: float, *, max_bad_share: float = 1.0, follow_links: bool = False
) -> Contents:
    """Read a folder in any of the layouts that `LAYOUT` names, and every file in it that a run would read.

    Classes are the lines of `classes.txt`, in the root or in `train/`: line i, from 1, is mask value i. Without
    that file they are the tags in alphabetical order. Masks, for evaluation only, are `masks/<id>.png`, or lie
    below `masks/` as the images below `images/`. An image whose tags are empty shows none of the classes.
    What cannot be used is left out: see `mcic.data.dropped.DROPPED`. Links may lead out of the folder if
    `follow_links`; otherwise such images are left out, and such folders and tables refused.

    Where all images that one table in the root names lie in `train/` or `val/`, these are the sides; so are `images/`
    and a `val/` beside it that has images and tags of its own. Without `val/` about `val_share` (0…1) of the images is
    held out. Each image's id decides, so that an image stays on its side when others are added.

    Raises:
        ValueError: the layout is not as expected, a table of tags cannot be read, a tag is not in `classes.txt`, a
            mask holds values that are no class, or more than `max_bad_share` (0…1) of the images cannot be used.
    """
    fence = Fence.around(root, follow_links=follow_links)
    root = fence.root
    train_root = root / "train" if _has_parts(root, fence) else root
    val_root = _val_folder(root)
    if val_root is not None and train_root == root and not _stands_alone(root, val_root, fence):
        val_root = None  # a class, or images that the table in the root names
    parts = [train_root] if val_root is None else [train_root, val_root]
    found = [_read_part(fence.require(part), fence) for part in parts]
    every = [photo for photos, _ in found for photo in photos]
    classes = _classes(every, (root / "classes.txt", train_root / "classes.txt"), fence)
    dropped = [entry for _, losses in found for entry in losses]
    if train_root != root and (root / "masks").is_dir():
        dropped.append(Dropped("masks", str(root / "masks"), "expected below train/ and val/"))
    known = {*parts, *(root / name for name in _NO_CLASSES)}
    others = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    beside = others if train_root != root else []  # of class folders none is, nor of a table that finds images anywhere
    if any((root / name).is_dir() for name in IMAGE_FOLDERS):
        beside = [path for path in others if path.name.casefold() in ("train", *VAL_FOLDERS)]
    dropped += [Dropped("part", str(path)) for path in beside if path not in known]
    sides = []
    for part, (photos, _) in zip(parts, found, strict=True):
        kept, losses = readable(photos, num_classes=len(classes))
        dropped += losses
        if not kept:
            raise ValueError(f"no image of {part} can be read: {describe(losses)}")
        sides.append(kept)
    require_few(dropped, usable=sum(map(len, sides)), share=max_bad_share)
    named = _sides_by_name(sides[0]) if len(sides) == 1 and _has_table(train_root) else None
    held_out = len(sides) == 1 and named is None
    if held_out:
        sides = _held_out(sides[0], val_share, root)
    return Contents(*(named or sides), classes=classes, dropped=tuple(dropped), held_out=held_out)


def _sides_by_name(photos: list[Photo]) -> list[list[Photo]] | None:
    """Train and val where all of one table's images lie in folders of these names, and both are there."""
    sides: dict[bool, list[Photo]] = {False: [], True: []}
    for photo in photos:
        first, slash, _ = photo.name.casefold().partition("/")
        if not slash or first not in ("train", *VAL_FOLDERS):
            return None
        sides[first != "train"].append(photo)
    return list(sides.values()) if all(sides.values()) else None


def _held_out(photos: list[Photo], share: float, root: Path) -> list[list[Photo]]:
    """Train and val, neither of them empty."""
    if len(photos) < 2:
        raise ValueError(f"--data.root has {len(photos)} image: at least one to train and one to hold out are needed, "
                         f"got {root}")  # fmt: skip
    # By the name, not by the id: x.jpg and x.png, which mostly are one picture, stay together, unless they are all.
    names = {photo.id: file_name(photo.name) for photo in photos}
    if len(set(names.values())) == 1:
        names = {photo.id: photo.id for photo in photos}
    places = {image_id: _fraction(name) for image_id, name in names.items()}
    low, *_, high = sorted(places.values())
    border = min(max(share, np.nextafter(low, 1)), high)
    train = [photo for photo in photos if places[photo.id] >= border]
    return [train, [photo for photo in photos if places[photo.id] < border]]


def _fraction(text: str) -> float:
    """A number in 0…1 that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(name_bytes(text), digest_size=6).digest()) / 2**48


def _classes(photos: Iterable[Photo], files: Iterable[Path], fence: Fence) -> tuple[str, ...]:
    """The lines of the first file that is there, else the tags, of images that turn out to be broken too."""
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return check_classes(sorted({tag for photo in photos for tag in photo.tags}), source=fence.root)
    lines = [spelt(line, file) for line in read_text(fence.require(file)).rstrip().splitlines()]
    if "" in lines:
        raise ValueError(f"{file}, line {lines.index('') + 1} is empty: line i names mask value i")
    classes = check_classes(lines, source=file)
    for photo in photos:
        for tag in sorted(photo.tags - set(classes)):
            raise ValueError(
                f"image {photo.path} has the tag {shown(tag)!r}, which is not in {file}{nearest(tag, classes)}"
            )
    return classes


def _has_parts(root: Path, fence: Fence) -> bool:
    """Whether `train/` is a part of the data; beside other class folders, holding just images, it is a class."""
    train = root / "train"
    if not train.is_dir() or find_tables(root):
        return False
    return _has_table(train) or bool(_class_folders(train, fence)[0])


def _val_folder(root: Path) -> Path | None:
    """`val/` or the first other of `VAL_FOLDERS` that is there; one in another case where none is spelt like these."""
    exact = [root / name for name in VAL_FOLDERS if (root / name).is_dir()]
    others = [path for path in sorted(root.iterdir()) if path.name.casefold() in VAL_FOLDERS and path.is_dir()]
    return next(iter(exact + others), None)


def _stands_alone(root: Path, val_root: Path, fence: Fence) -> bool:
    """Whether `val/`, beside images and tags right in the root, holds images and tags of its own."""
    train = root / "train"
    if not any((root / name).is_dir() for name in IMAGE_FOLDERS) or (train.is_dir() and _files(train, fence)[0]):
        return False
    fence.require(val_root)
    if find_tables(val_root):
        return bool(_files(val_root, fence)[0])
    return bool(_class_folders(val_root, fence)[0])


def _has_table(part: Path) -> bool:
    return bool(find_tables(part)) or any((part / name).is_dir() for name in IMAGE_FOLDERS)


def _read_part(part: Path, fence: Fence) -> tuple[list[Photo], list[Dropped]]:
    """The photos that have tags, with their masks, in the order of their ids; and what was left out."""
    photos, dropped = _read_tagged(part, fence) if _has_table(part) else _read_class_folders(part, fence)
    photos = _told_apart(photos, part)
    photos, stray = _with_masks(sorted(photos, key=lambda photo: photo.id), fence.require(part / "masks"), fence)
    untagged = {Path(entry.name).stem for entry in dropped if entry.kind == "image"}
    return photos, dropped + [entry for entry in stray if Path(entry.name).stem not in untagged]


def _told_apart(photos: list[Photo], part: Path) -> list[Photo]:
    """The photos, with the files' endings in the ids of those that differ in nothing else: x.jpg beside x.png."""
    shared = {name for name, count in Counter(photo.id for photo in photos).items() if count > 1}
    photos = [replace(photo, id=file_name(photo.name + photo.path.suffix)) if photo.id in shared else photo
              for photo in photos]  # fmt: skip
    by_id: dict[str, Photo] = {}
    for photo in photos:
        if (other := by_id.setdefault(photo.id, photo)) is not photo:
            raise ValueError(f"{part} has several images of the id {shown(photo.id)!r}, {other.path} and {photo.path}: "
                             "rename all but one")  # fmt: skip
    return photos


def _read_tagged(part: Path, fence: Fence) -> tuple[list[Photo], list[Dropped]]:
    """A table of tags, and images in one of `IMAGE_FOLDERS` or anywhere in `part`; several rows of one image add up."""
    images = fence.require(next((part / name for name in IMAGE_FOLDERS if (part / name).is_dir()), part))
    table, *unread = find_tables(part) or [None]
    files, others, dropped = _files(images, fence)
    if table is None or not files:
        if dropped:
            raise ValueError(f"no image of {images} can be used: {describe(dropped)}; {dropped[0].reason}")
        raise ValueError(f"--data.root has no {'tags.csv' if files else 'images'}: expected {LAYOUT}, got {part}")
    paths: dict[str, Path] = {}
    for path in files:
        if (other := paths.setdefault(key_of(path.relative_to(images)), path)) is not path:
            raise ValueError(f"{other} and {path} have names that look the same: rename one of them")
    tags, lost = _matched(read_table(table, fence), paths)
    if not tags:
        raise ValueError(f"no row of {table} names an image in {images}")
    dropped += [Dropped("row", name) for name in lost]
    dropped += [Dropped("image", str(path)) for key, path in paths.items() if key not in tags]
    dropped += [Dropped("kind", str(path), path.suffix) for path in others]
    dropped += [Dropped("table", str(path), f"{table.name} is read") for path in unread]
    return [_photo(stem_of(key), paths[key], tags[key]) for key in tags], dropped


def _matched(rows: Sequence[Row], keys: Iterable[str]) -> tuple[dict[str, set[str]], list[str]]:
    """The tags of every image that rows name, and the names that fit no image."""
    names = ImageNames(keys, named={row.image for row in rows}.intersection(keys))
    tags: dict[str, set[str]] = {}
    lost = []
    for row in rows:
        key = names.find(row)
        if key is None:
            lost.append(row.image)
        else:
            tags.setdefault(key, set()).update(row.tags)
    return tags, lost


def _read_class_folders(part: Path, fence: Fence) -> tuple[list[Photo], list[Dropped]]:
    """One sub-folder per class; what lies deeper in it counts too.

    Files of one name in two of them are different images, unless their content is equal: then it is one image, which
    has both tags.
    """
    folders, others = _class_folders(part, fence)
    if {folder.name.casefold() for folder in folders} <= {"train", "test", *VAL_FOLDERS}:
        raise ValueError(f"--data.root has no images with tags: expected {LAYOUT}, got {part}")
    by_name: dict[str, list[Photo]] = defaultdict(list)
    dropped = [Dropped("folder", str(path)) for path in others]
    loose = (path for path in sorted(part.iterdir()) if path.suffix.lower() in readable_suffixes() and path.is_file())
    dropped += [Dropped("loose", str(path)) for path in loose if not path.name.startswith(".")]
    for folder in folders:
        files, others, losses = _files(folder, fence)
        dropped += [*losses, *(Dropped("kind", str(path), path.suffix) for path in others)]
        for path in files:
            photo = _photo(stem_of(key_of(path.relative_to(part))), path, {nfc(" ".join(folder.name.split()))})
            alike = by_name[path.name]
            for place, other in enumerate(alike):
                if filecmp.cmp(other.path, path, shallow=False):
                    alike[place] = replace(other, tags=other.tags | photo.tags)
                    break
            else:
                alike.append(photo)
    return [photo for alike in by_name.values() for photo in alike], dropped


def _class_folders(part: Path, fence: Fence) -> tuple[list[Path], list[Path]]:
    """Sub-folders with images right in them, and those with images only deeper, where a run may have left its own.

    Hidden ones, `images/` and `masks/` are neither. One that is a link out of bounds, or that cannot be opened, is
    refused: a class must not vanish.
    """
    classes, others = [], []
    for folder in sorted(path for path in part.iterdir() if path.is_dir()):
        if is_hidden(folder.name) or folder.name in _NO_CLASSES:
            continue
        images, _, losses = _files(fence.require(folder), fence)
        if any(entry.kind == "closed" and entry.name == str(folder) for entry in losses):
            raise ValueError(f"{folder} cannot be opened: its name may be a class; allow it, or take it away")
        if any(path.parent == folder for path in images):
            classes.append(folder)
        elif images:
            others.append(folder)
    return classes, others


def _files(folder: Path, fence: Fence) -> tuple[list[Path], list[Path], list[Dropped]]:
    """Images at any depth, files that may be images of a kind that is not read, and what the fence leaves out.

    No hidden ones, and no masks.
    """
    found, dropped = fence.files(folder)
    masks = folder / "masks"
    found = [path for path in found if not path.is_relative_to(masks)]
    images = [path for path in found if path.suffix.lower() in readable_suffixes()]
    others = [path for path in found if path.suffix.lower() not in readable_suffixes() | _NO_IMAGES]
    return images, others, [entry for entry in dropped if not Path(entry.name).is_relative_to(masks)]


def _with_masks(photos: list[Photo], folder: Path, fence: Fence) -> tuple[list[Photo], list[Dropped]]:
    """The photos with their masks: found by id, or by path or bare file name where only one photo has it."""
    found, dropped = fence.files(folder) if folder.is_dir() else ([], [])
    files = [path for path in found if path.suffix.lower() == ".png"]
    masks = {stem_of(key_of(path.relative_to(folder))): path for path in files}
    paths = Counter(photo.name for photo in photos)
    bare = Counter(PurePosixPath(photo.name).name for photo in photos)

    def mask(photo: Photo) -> Path | None:
        name = PurePosixPath(photo.name).name
        by_path = masks.get(photo.name) if paths[photo.name] == 1 else None
        return by_path or masks.get(photo.id) or (masks.get(name) if bare[name] == 1 else None)

    photos = [replace(photo, mask=mask(photo)) for photo in photos]
    stray = sorted(set(files) - {photo.mask for photo in photos})
    losses = [Dropped("mask", entry.name, entry.reason) for entry in dropped]
    others = [path for path in found if path.suffix.lower() not in {".png"} | _NO_IMAGES]
    losses += [Dropped("mask", str(path), "masks are PNG files") for path in others]
    return photos, [*losses, *(Dropped("stray", str(path)) for path in stray)]


def _photo(name: str, path: Path, tags: Iterable[str]) -> Photo:
    return Photo(file_name(name), name, path, frozenset(tags))
