"""A user's own photographs: a folder of images with a table of tags, or one sub-folder per class."""

from __future__ import annotations

import csv
import filecmp
import hashlib
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

import numpy as np

from mcic.data.base import Dataset, Splits
from mcic.data.images import read_image, read_mask, readable_suffixes
from mcic.data.names import check_classes, tag_matrix
from mcic.data.palette import voc_palette
from mcic.suggest import nearest

log = logging.getLogger(__name__)

LAYOUT = (
    "images/ and tags.csv (header image,tags; tags joined by |), or one sub-folder of images per class; "
    "either directly or under train/ and val/"
)


@dataclass(frozen=True, slots=True)
class Photo:
    """One image of a folder.

    Attributes:
        id: `name`, with `__` for `/`.
        name: the path below `images/` or below the class folders' parent, without the ending; Unicode form NFC.
        path: the file.
        tags: names of its classes.
        mask: the file of its mask, or None.
    """

    id: str
    name: str
    path: Path
    tags: frozenset[str]
    mask: Path | None = None


class Folder(Dataset):
    """Photographs and their tags; `Folder.splits` reads them from disk."""

    def __init__(self, photos: Sequence[Photo], classes: tuple[str, ...], *, name: str) -> None:
        self.name = name
        self.classes = classes
        self.palette = voc_palette(len(classes) + 1)
        self.photos = list(photos)
        self.ids = [photo.id for photo in photos]
        places = {tag: place for place, tag in enumerate(classes)}
        self.tags = tag_matrix([{places[tag] for tag in photo.tags} for photo in photos], len(classes))

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path(index))

    def mask(self, index: int) -> np.ndarray | None:
        path = self.photos[index].mask
        return None if path is None else read_mask(path)

    def path(self, index: int) -> Path:
        return self.photos[index].path

    def _keep(self, indices: np.ndarray) -> None:
        super()._keep(indices)
        self.photos = [self.photos[i] for i in indices]

    @classmethod
    def splits(cls, root: str | Path, val_share: float) -> Splits:
        """Read a folder in any of the layouts that `LAYOUT` names.

        Classes are the lines of `classes.txt`, in the root or in `train/`: line i, from 1, is mask value i. Without
        that file they are the tags in alphabetical order. Masks, for evaluation only, are `masks/<id>.png`, or lie
        below `masks/` as the images below `images/`. An image whose tags are empty shows none of the classes.

        Without `val/` about `val_share` (0…1) of the images is held out. Each image's id decides, so that an image
        stays on its side when others are added.

        Raises:
            ValueError: the layout is not as expected, or a tag is not in `classes.txt`.
        """
        root = Path(root).expanduser().resolve()
        train_root = root / "train" if _has_parts(root) else root
        train = _read_part(train_root)
        if train_root != root and (root / "val").is_dir():
            val = _read_part(root / "val")
        else:
            train, val = _held_out(train, val_share, root)
        classes = _classes([*train, *val], (root / "classes.txt", train_root / "classes.txt"), root)
        return Splits(cls(train, classes, name=root.name), cls(val, classes, name=root.name))


def _held_out(photos: list[Photo], share: float, root: Path) -> tuple[list[Photo], list[Photo]]:
    """(train, val), neither of them empty."""
    if len(photos) < 2:
        raise ValueError(f"--data.root has {len(photos)} image: at least one to train and one to hold out are needed, "
                         f"got {root}")  # fmt: skip
    places = {photo.id: _fraction(photo.id) for photo in photos}
    low, *_, high = sorted(places.values())
    border = min(max(share, np.nextafter(low, 1)), high)
    train = [photo for photo in photos if places[photo.id] >= border]
    return train, [photo for photo in photos if places[photo.id] < border]


def _fraction(text: str) -> float:
    """A number in 0…1 that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def _classes(photos: Iterable[Photo], files: Iterable[Path], root: Path) -> tuple[str, ...]:
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return check_classes(sorted({tag for photo in photos for tag in photo.tags}), source=root)
    lines = [_nfc(line.strip()) for line in _text(file).rstrip().splitlines()]
    if "" in lines:
        raise ValueError(f"{file}, line {lines.index('') + 1} is empty: line i names mask value i")
    classes = check_classes(lines, source=file)
    for photo in photos:
        for tag in sorted(photo.tags - set(classes)):
            raise ValueError(f"image {photo.path} has the tag {tag!r}, which is not in {file}{nearest(tag, classes)}")
    return classes


def _has_parts(root: Path) -> bool:
    """Whether `train/` is a part of the data; beside other class folders, holding just images, it is a class."""
    train = root / "train"
    if (root / "tags.csv").exists() or not train.is_dir():
        return False
    return _has_table(train) or bool(_class_folders(train))


def _has_table(part: Path) -> bool:
    return (part / "tags.csv").exists() or (part / "images").is_dir()


def _read_part(part: Path) -> list[Photo]:
    photos = _read_table(part) if _has_table(part) else _read_class_folders(part)
    clashing = [name for name, count in Counter(photo.id for photo in photos).items() if count > 1]
    if clashing:
        raise ValueError(f"{part} has several images of the id {clashing[0]!r}: rename all but one")
    return _with_masks(sorted(photos, key=lambda photo: photo.id), part / "masks")


def _read_table(part: Path) -> list[Photo]:
    """`images/` and `tags.csv`; several rows of one image add up."""
    images, table = part / "images", part / "tags.csv"
    for path, there in ((images, images.is_dir()), (table, table.is_file())):
        if not there:
            raise ValueError(f"--data.root has no {path.name}: expected {LAYOUT}, got {part}")
    files = {_key(path.relative_to(images)): path for path in _image_files(images, deep=True)}
    keys = {_stem(key): key for key in files} | {key: key for key in files}
    tags: dict[str, set[str]] = {}
    lost = []
    for name, row_tags in _rows(table):
        if name in keys:
            tags.setdefault(keys[name], set()).update(row_tags)
        else:
            lost.append(name)
    _warn_dropped(table, rows=lost, images=[key for key in files if key not in tags])
    if not tags:
        raise ValueError(f"no row of {table} names an image in {images}")
    return [_photo(_stem(key), files[key], tags[key]) for key in tags]


def _rows(table: Path) -> Iterator[tuple[str, set[str]]]:
    """Image name and tags of every row."""
    reader = csv.DictReader(_text(table).splitlines(keepends=True), restval="")
    header = [name.strip() for name in reader.fieldnames or ()]
    if not {"image", "tags"} <= set(header):
        raise ValueError(f"{table} must have the header image,tags; its first line is {','.join(header)!r}")
    reader.fieldnames = header
    for row in reader:
        where = f"{table}, line {reader.line_num}"
        if None in row:
            raise ValueError(f"{where} has more columns than the header: several tags are joined by |")
        path = PurePosixPath(row["image"].strip().replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: {row['image']!r} leaves images/: expected the name of a file in it")
        yield _key(path), {_nfc(tag.strip()) for tag in row["tags"].split("|") if tag.strip()}


def _warn_dropped(table: Path, *, rows: list[str], images: list[str]) -> None:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for names, what in ((rows, "rows without an image"), (images, "images without a row"))
        if names
    ]
    if parts:
        log.warning("%s: %s left out", table, " and ".join(parts))


def _read_class_folders(part: Path) -> list[Photo]:
    """One sub-folder per class.

    Files of one name in two of them are different images, unless their content is equal: then it is one image, which
    has both tags.
    """
    folders = _class_folders(part)
    if {folder.name for folder in folders} <= {"train", "val", "test"}:
        raise ValueError(f"--data.root has no images with tags: expected {LAYOUT}, got {part}")
    by_name: dict[str, list[Photo]] = defaultdict(list)
    for folder in folders:
        for path in _image_files(folder, deep=False):
            photo = _photo(_stem(_key(path.relative_to(part))), path, {_nfc(folder.name)})
            alike = by_name[path.name]
            for place, other in enumerate(alike):
                if filecmp.cmp(other.path, path, shallow=False):
                    alike[place] = replace(other, tags=other.tags | photo.tags)
                    break
            else:
                alike.append(photo)
    return [photo for alike in by_name.values() for photo in alike]


def _class_folders(part: Path) -> list[Path]:
    """Sub-folders with images in them, in order; hidden ones, `images/` and `masks/` are no classes."""
    return sorted(
        path for path in part.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
        and path.name not in ("images", "masks") and _image_files(path, deep=False)
    )  # fmt: skip


def _image_files(folder: Path, *, deep: bool) -> list[Path]:
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(
        path for path in files
        if path.suffix.lower() in readable_suffixes() and not path.name.startswith(".") and path.is_file()
    )  # fmt: skip


def _with_masks(photos: list[Photo], folder: Path) -> list[Photo]:
    """The photos with their masks: found by path, by id, or by the bare file name where only one photo has it."""
    masks = {_stem(_key(path.relative_to(folder))): path for path in folder.rglob("*.png")}
    bare = Counter(PurePosixPath(photo.name).name for photo in photos)

    def mask(photo: Photo) -> Path | None:
        name = PurePosixPath(photo.name).name
        return masks.get(photo.name) or masks.get(photo.id) or (masks.get(name) if bare[name] == 1 else None)

    return [replace(photo, mask=mask(photo)) for photo in photos]


def _photo(name: str, path: Path, tags: Iterable[str]) -> Photo:
    return Photo(name.replace("/", "__"), name, path, frozenset(tags))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error


def _key(path: PurePath) -> str:
    return _nfc(path.as_posix())


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()


def _nfc(text: str) -> str:
    """One spelling for names that look the same: some file systems store é as two characters."""
    return unicodedata.normalize("NFC", text)
