"""Bad files of every kind, and what watches over a folder while they are read."""

import contextlib
import io
import os
import signal
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from trees import make_table, save_image, scene

SECONDS = 20
"""within which anything is decided"""
DEEP = 100_000
LAUGHS = "<!DOCTYPE a [<!ENTITY a '" + "ha" * 99 + "'>" + "".join(
    f"<!ENTITY {new} '{f'&{old};' * 10}'>" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
) + "]><annotation><object><name>&i;</name></object></annotation>"  # fmt: skip
RGB = Image.fromarray(scene(50, [1], size=(12, 16))[0])
SIZE = (12, 16)


@contextlib.contextmanager
def time_limit():
    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state_of(folder: Path) -> dict[str, object]:
    """Everything that is there, with what is in it; taken without following a link or opening a pipe."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(facts.st_mode) and os.access(path, os.R_OK) else None
        found[str(path)] = (facts.st_mode, facts.st_mtime_ns, content)
    return found


def written(name: str | bytes, content: bytes) -> Callable[[Path], None]:
    def make(root):
        path = root / "ant" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


def cut(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind)[:3000]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *, rows: int = 0, colours: int = 0) -> bytes:
    """A PNG of one bit a pixel whose header says width × height, with that many rows of zeros in it.

    `colours`: 0 grey, 3 a palette, which is missing.
    """

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, colours, 0, 0, 0)
    row = bytes(1 + (width + 7) // 8)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def odd_exif(orientation: int) -> bytes:
    """An EXIF block with a resolution that is text, which Pillow reads and cannot write."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


def turned() -> Image.Image:
    image = Image.fromarray(scene(1, [1], size=(12, 16))[0])
    image.getexif()[0x0112] = 6
    return image


def outside(root: Path) -> Path:
    """A picture and a folder with a picture that are none of the data's business."""
    folder = root.parent / "outside"
    save_image(folder / "more" / "secret.png", scene(60, [1], size=SIZE)[0])
    return folder


def linked(name: str, target: str | Callable[[Path], Path]) -> Callable[[Path], None]:
    def make(root):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target if isinstance(target, str) else target(root))

    return make


def make_classes(root: Path) -> set[str]:
    for place in range(8):
        save_image(root / ("ant", "bee")[place % 2] / f"{place}.png", scene(place, [1], size=(12, 16))[0])
    return {f"{('ant', 'bee')[place % 2]}__{place}" for place in range(8)}


def make_tagged(root: Path) -> set[str]:
    make_table(root, {f"{place}.png": ("ant", "bee")[place % 2] for place in range(8)})
    (root / "classes.txt").write_text("ant\nbee\n")
    return {str(place) for place in range(8)}


def masked(image: Image.Image | bytes, name: str = "3.png") -> Callable[[Path], None]:
    def make(root):
        (root / "masks" / name).unlink(missing_ok=True)
        (root / "masks" / name).write_bytes(image if isinstance(image, bytes) else encoded(image))

    return make


SECRET, MORE = (lambda root: outside(root) / "more" / "secret.png"), (lambda root: outside(root) / "more")
