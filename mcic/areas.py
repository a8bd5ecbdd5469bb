"""`areas.csv`: a row for every image and class that occurs in it, and the memory of what `mcic predict` has done.

It says which image has which name, and with what its mask was made. Under torchrun every rank but the first writes the
rows of its share into a file of its own beside it, `.areas-<rank>.csv`; the first takes them over, at the end, or after
an interruption at the next start.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mcic.durable import sync, write_text

_COLUMNS = ("image", "name", "width", "height", "class", "pixels", "percent", "mean_confidence",
            "made_with")  # fmt: skip


class AreaTable:
    """The rows of every image; an image's pixels add up to its size.

    Args:
        folder: with the table.
        rank: whose file `add` writes to.

    Attributes:
        rows: path of an image → its rows.

    Raises:
        ValueError: `areas.csv` is another program's.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.path = folder / "areas.csv"
        self._own = self.path if rank == 0 else folder / f".areas-{rank}.csv"
        self.rows = _rows(self.path)

    def take_over(self, order: Sequence[Path]) -> None:
        """Take the other ranks' rows over and write the table: the images in this order, behind those not in it.

        For one process at a time, while no other one writes.
        """
        parts = sorted(self.path.parent.glob(".areas-*.csv"))
        for part in parts:
            self.rows |= _rows(part)
        places = {str(path): place for place, path in enumerate(order)}
        ordered = sorted(self.rows, key=lambda image: places.get(image, -1))
        self.rows = {image: self.rows[image] for image in ordered}
        if self.rows or self.path.is_file():
            write_text(self.path, _text([row for rows in self.rows.values() for row in rows], header=True))
        for part in parts:
            part.unlink()

    def digest(self, image: Path) -> str | None:
        """What an image's mask was made with, see `predictions._digests`."""
        rows = self.rows.get(str(image))
        return rows[0]["made_with"] if rows else None

    def keep(self, images: Iterable[Path]) -> list[str]:
        """Forget all images but these; returns the names of the others."""
        kept = {str(path) for path in images}
        forgotten = [rows[0]["name"] for image, rows in self.rows.items() if image not in kept]
        self.rows = {image: rows for image, rows in self.rows.items() if image in kept}
        return forgotten

    def add(self, image: Path, rows: list[dict[str, Any]]) -> None:
        """Put the rows of an image into this rank's file, at its end."""
        is_new = not self._own.is_file()
        with self._own.open("a", encoding="utf-8", newline="") as file:
            file.write(_text(rows, header=is_new))
            file.flush()
            os.fsync(file.fileno())  # before the mask comes: one without rows would be somebody else's
        if is_new:
            sync(self.path.parent)
        self.rows[str(image)] = rows


def _rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Path of an image → its rows, of those whose rows are complete."""
    found: dict[str, list[dict[str, Any]]] = {}
    left: dict[str, int] = {}
    for row in _read(path):
        if not left.get(row["image"]):  # the first row of an image, or of one that was predicted again
            found.pop(row["image"], None)
            left[row["image"]] = row["width"] * row["height"]
        found.setdefault(row["image"], []).append(row)
        left[row["image"]] -= row["pixels"]
    return {image: rows for image, rows in found.items() if left[image] == 0}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of the file but one that an interruption tore."""
    if not path.is_file():
        return
    try:
        content, head = path.read_bytes(), _text([], header=True).encode()
        if not content.startswith(head) and not head.startswith(content):
            raise ValueError("other columns")
        text = content[: content.rfind(b"\n") + 1].decode()  # cut before it is decoded: a letter may be torn, too
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield {**row, **{name: int(row[name]) for name in ("width", "height", "pixels")}}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not of mcic predict: choose another folder for --out") from error


def _text(rows: list[dict[str, Any]], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
