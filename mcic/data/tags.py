"""Tables of image-level tags in the forms that people have them: CSV, JSON, COCO JSON, VOC XML.

Every reader takes a path and returns the same: a list of `Row`. Nothing here looks for the images.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from mcic.data.fence import Fence, is_hidden
from mcic.untrusted import parse_json, read_json, read_text, require_file, shown

log = logging.getLogger(__name__)

TABLES = (
    "tags.csv", "tags.tsv", "tags.json", "tags.jsonl", "labels.csv", "labels.tsv", "labels.json", "labels.jsonl",
    "annotations.csv", "annotations.json", "metadata.csv", "metadata.jsonl",
)  # fmt: skip
"""file names of tables that need no look inside"""

IMAGE_KEYS = ("image", "imagename", "imagefile", "imagepath", "imageid", "img", "filename", "filepath", "file", "path",
              "name")  # fmt: skip
TAG_KEYS = ("tags", "tag", "labels", "label", "classes", "class", "classname", "categories", "category")
"""names of columns and keys, the first one found counts; case, spaces, _ and - play no part"""

_NAME_KEYS = ("name", *TAG_KEYS)  # of a tag that is an object
_WRAPPERS = ("images", "annotations", "data", "items", "samples")
_COCO_KEYS = {"images", "annotations", "categories"}
_LONGEST = 4096
"""characters of a name; composing accents takes time that grows with the square of their number"""
_YES, _NO = {"1", "1.0", "true", "yes"}, {"", "0", "0.0", "-1", "false", "no"}


@dataclass(frozen=True, slots=True)
class Row:
    """The tags of one image as a table states them; several rows of an image add up.

    Attributes:
        image: a path below the folder of images, joined by `/`, in Unicode form NFC; its ending may be missing.
        tags: names of classes, NFC, without spaces around them.
        where: the place in the table, for messages.
    """

    image: str
    tags: frozenset[str]
    where: str


def find_tables(part: Path) -> list[Path]:
    """The tables of tags in a folder, the one that counts first: by name, then COCO JSON, then VOC annotations.

    A table is a file, or for VOC annotations the folder of the XML files: `Annotations/`, or `part` itself. Hidden
    files, and in `part` XML files of other things, are none.
    """
    found = [path for name in TABLES if (path := part / name).is_file()]
    folders = [folder for name in ("annotations", "Annotations") if (folder := part / name).is_dir()]
    for folder in (part, *folders):
        found += [path for path in _visible(folder, "*.json") if path not in found and _looks_like_coco(path)]
    found += [folder for folder in folders if _visible(folder, "*.xml")]
    found += [part] if any(_looks_like_voc(path) for path in _visible(part, "*.xml")) else []
    return list({path.resolve(): path for path in found}.values())  # where case plays no part, a folder comes twice


def is_table(path: Path) -> bool:
    """Whether a name is that of a file which `read_table` reads, by its ending."""
    return path.suffix.lower() in _READERS


def read_table(path: Path, fence: Fence | None = None) -> list[Row]:
    """The rows of a table that `find_tables` found.

    Args:
        path: the file, or for VOC annotations the folder.
        fence: what links may lead to; None: anything.

    Raises:
        ValueError: the table does not hold what its kind should, with file and line or entry; an image's name is
            absolute or has `..` in it; or the table is a link out of bounds.
        OSError: it cannot be read.
    """
    fence = fence or Fence.around(path.parent, follow_links=True)
    fence.require(path)
    try:
        return read_voc(path, fence) if path.is_dir() else _READERS[path.suffix.lower()](path)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: {error}") from error


def read_csv(path: Path) -> list[Row]:
    """Rows of a table with a header, delimited by comma, semicolon or tab.

    Its columns are an image and its tags (named as in `IMAGE_KEYS` and `TAG_KEYS`; others are passed over), the tags
    joined by `|`, else by `;`, else by `,`, whichever the column has. Or an image and one column of 0 and 1 per class.
    """
    text = read_text(path)
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        lines, ends = [], [0]
        for cells in reader:
            lines.append((reader.line_num, [cell.strip() for cell in cells]))
            ends.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    for begin, end in pairwise(ends):
        if (end > begin + 1 or end == ends[-1]) and _has_open_quote(text, begin, end, delimiter):
            raise ValueError(f"{path}, line {begin + 1}: a quote has no end")
    lines = [(number, cells) for number, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    image = _column(header, IMAGE_KEYS)
    if image is None or len(header) < 2:
        raise ValueError(f"{path} must have the header image,tags; its first line is {shown(delimiter.join(header))!r}")
    rows = [(f"{path}, line {number}", _even(cells, len(header), f"{path}, line {number}"))
            for number, cells in lines[1:]]  # fmt: skip
    tags = _column(header, TAG_KEYS)
    if tags is None:
        if twice := [name for name, count in Counter(header).items() if name and count > 1]:
            raise ValueError(f"{path} has several columns {shown(twice[0])!r}: a class has one")
        return [Row(image_name(cells[image], where), _marked(header, cells, image, where), where)
                for where, cells in rows]  # fmt: skip
    separator = next((mark for mark in "|;," if any(mark in cells[tags] for _, cells in rows)), "|")
    if separator != "|":
        log.info("%s: tags are joined by %r, since no row has |", path, separator)
    return [Row(image_name(cells[image], where), _split(cells[tags], separator, where), where)
            for where, cells in rows]  # fmt: skip


def _has_open_quote(text: str, begin: int, end: int, delimiter: str) -> bool:
    """Whether a row, the lines `begin` to `end` of a table, has a quote that was meant to end in its first line.

    A quote within a line is what people write, `"5" nail"`; in a row of several lines it is the next row's.
    """
    row = islice(io.StringIO(text, newline=""), begin, end)
    try:
        list(csv.reader(row, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return end > begin + 1 or "unexpected end of data" in str(error)
    return False


def read_tags_json(path: Path) -> list[Row]:
    """Rows of a JSON file: COCO instances, an object `{image: tags}`, or a list of objects with an image and tags.

    Tags are a list of names, one string with `|` between them, or an object `{name: true or false}`.
    """
    content = read_json(path)
    if isinstance(content, dict) and content.keys() >= _COCO_KEYS:
        return _coco_rows(content, path)
    if isinstance(content, dict):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), list | dict)), content)
    if isinstance(content, dict):
        return [_row(name, tags, f"{path}, {shown(name)!r}") for name, tags in content.items()]
    if not isinstance(content, list):
        raise ValueError(f'{path} must hold {{"image": ["tag", …]}} or a list of objects with "image" and "tags", '
                         f"got a {type(content).__name__}")  # fmt: skip
    return _with_tags([_entry_row(entry, f"{path}, entry {place}") for place, entry in enumerate(content, 1)], path)


def _with_tags(rows: list[Row | None], path: Path) -> list[Row]:
    """Those that say what their image shows."""
    tagged = [row for row in rows if row is not None]
    if rows and not tagged:
        raise ValueError(f'{path}: no entry has "tags" (or another of {", ".join(TAG_KEYS)})')
    return tagged


def read_json_lines(path: Path) -> list[Row]:
    """Rows of a file with one JSON object a line, each with an image and tags."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # U+2028, say, may stand in a JSON text
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(_entry_row(parse_json(line, where), where))
    return _with_tags(rows, path)


def read_voc(folder: Path, fence: Fence) -> list[Row]:
    """One row per XML file: the image has the file's name, its tags are the names of its objects, difficult or not."""
    rows = []
    for path in _visible(folder, "**/*.xml"):
        name = path.relative_to(folder).with_suffix("").as_posix()
        rows.append(Row(image_name(name, str(path)), object_names(fence.require(path)), str(path)))
    return rows


def object_names(annotation: Path) -> frozenset[str]:
    """Names of the objects in a VOC annotation; a part of an object, e.g. a head, is none."""
    try:
        require_file(annotation)
        tree = defusedxml.ElementTree.parse(annotation)
        return _clean((name.text or "" for name in tree.iterfind("object/name")), str(annotation))
    except (defusedxml.ElementTree.ParseError, DefusedXmlException, LookupError, ValueError) as error:
        raise ValueError(f"cannot read the annotation {annotation}: {error!r}") from error


def entry_tags(entry: Any, where: str) -> frozenset[str] | None:
    """The tags in a JSON document about one image: itself, or under one of `TAG_KEYS`; None where it has no such key.

    Raises:
        ValueError: names `where`; they are in no form that `read_tags_json` knows.
    """
    if isinstance(entry, dict) and (entry := _value(entry, TAG_KEYS)) is None:
        return None
    return _clean(_names(entry, where), where)


def split_tags(text: str, where: str) -> frozenset[str]:
    """The tags in a text about one image, joined by | or on lines of their own; raises ValueError as `spelt`."""
    return _clean(text.replace("\n", "|").split("|"), where)


def nfc(text: str) -> str:
    """One spelling for names that look the same: some file systems store é as two characters."""
    return unicodedata.normalize("NFC", text)


def spelt(name: str, where: object) -> str:
    """A name from a file in one spelling, without spaces around it; raises ValueError for what is too long for one."""
    if len(name) > _LONGEST:
        raise ValueError(f"{where}: {shown(name)!r} has {len(name)} characters: a name has at most {_LONGEST}")
    return nfc(" ".join(name.split()))


def key_of(path: PurePath) -> str:
    """A relative path as tables and ids spell it."""
    return nfc(path.as_posix())


def _column(header: list[str], keys: Iterable[str]) -> int | None:
    """The place of the first of `keys` in a header."""
    plain = [_plain(name) for name in header]
    return next((plain.index(key) for key in keys if key in plain), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " _-")


def _even(cells: list[str], width: int, where: str) -> list[str]:
    """A line of exactly `width` cells."""
    if any(cells[width:]):
        raise ValueError(f"{where} has more columns than the header: several tags are joined by |")
    return (cells + [""] * width)[:width]


def _marked(header: list[str], cells: list[str], image: int, where: str) -> frozenset[str]:
    """The names of the columns that are marked with 1."""
    marks = {name: cell.casefold() for place, (name, cell) in enumerate(zip(header, cells, strict=True))
             if place != image}  # fmt: skip
    for name, mark in marks.items():
        if mark not in _YES | _NO:
            raise ValueError(f"{where} has {shown(mark)!r} under {shown(name)!r}: expected the "
                             "header image,tags, or 0 and 1 under the name of each class")  # fmt: skip
    return _clean((name for name, mark in marks.items() if mark in _YES), where)


def _split(cell: str, separator: str, where: str) -> frozenset[str]:
    """The tags of a cell; of a list that was written out, `['dog', 'cat']`, too."""
    if cell.startswith("[") and cell.endswith("]"):
        return _clean((tag.strip(" '\"") for tag in cell[1:-1].split(separator)), where)
    return _clean(cell.split(separator), where)


def _clean(tags: Iterable[str], where: str) -> frozenset[str]:
    return frozenset(spelt(tag, where) for tag in tags if tag.strip())


def image_name(name: Any, where: str) -> str:
    """The path of an image in the form of `Row.image`; raises ValueError for one that leaves the folder of images."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{where} names no image")
    if len(name) > _LONGEST:
        raise ValueError(f"{where}: the image's name has {len(name)} characters: expected at most {_LONGEST}")
    path = PurePosixPath(name.strip().replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {shown(name)!r} leaves images/: expected the name of a file in it")
    return key_of(path)


def _row(name: Any, tags: Any, where: str) -> Row:
    return Row(image_name(name, where), _clean(_names(tags, where), where), where)


def _entry_row(entry: Any, where: str) -> Row | None:
    """A row from an object with an image and tags, or from a pair of them; None where it says nothing of tags."""
    if isinstance(entry, list) and len(entry) == 2:
        return _row(*entry, where)
    if not isinstance(entry, dict) or (image := _value(entry, IMAGE_KEYS)) is None:
        raise ValueError(f'{where}: expected an object with "image" and "tags", got {str(entry)[:60]}')
    row = _row(image, _value(entry, TAG_KEYS), where)
    return row if any(_plain(key) in TAG_KEYS for key in entry) else None


def _value(entry: dict[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first of `keys`, or None."""
    plain = {_plain(key): value for key, value in entry.items()}
    return next((plain[key] for key in keys if key in plain), None)


def _names(tags: Any, where: str) -> Iterator[str]:
    """The names in whatever form JSON holds tags."""
    if tags is None:
        return
    if isinstance(tags, str):
        yield from tags.split("|")
    elif isinstance(tags, int) and not isinstance(tags, bool):
        yield str(tags)
    elif isinstance(tags, list):
        for tag in tags:
            yield from _names(tag, where)
    elif isinstance(tags, dict) and (named := _value(tags, _NAME_KEYS)) is not None and not isinstance(named, bool):
        yield from _names(named, where)
    elif isinstance(tags, dict) and all(isinstance(given, bool) or given in (0, 1) for given in tags.values()):
        yield from (name for name, given in tags.items() if given)
    else:
        raise ValueError(f"{where}: expected the names of its classes, got {str(tags)[:60]}")


def _visible(folder: Path, pattern: str) -> list[Path]:
    """What a pattern finds, in order, without what macOS leaves beside files, `._x.xml`."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def _looks_like_coco(path: Path) -> bool:
    """Whether it is worth parsing: other JSON files may lie around."""
    content = path.read_bytes() if path.is_file() else b""
    return all(f'"{key}"'.encode() in content for key in _COCO_KEYS)


def _looks_like_voc(path: Path) -> bool:
    if not path.is_file():
        return False
    content = path.read_bytes().replace(b"\0", b"")  # in UTF-16, too
    return re.search(rb"<(annotation|object)[\s>]", content, re.IGNORECASE) is not None


def _coco_rows(content: dict[str, Any], path: Path) -> list[Row]:
    try:
        classes = {category["id"]: category["name"] for category in content["categories"]}
        tags: dict[Any, set[str]] = {image["id"]: set() for image in content["images"]}
        for annotation in content["annotations"]:
            tags[annotation["image_id"]].add(classes[annotation["category_id"]])
        return [_row(image["file_name"], list(tags[image["id"]]), f"{path}, image {shown(str(image['id']))}")
                for image in content["images"]]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold COCO instances: {shown(repr(error))}") from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": read_csv, ".tsv": read_csv, ".json": read_tags_json, ".jsonl": read_json_lines,
}  # fmt: skip
