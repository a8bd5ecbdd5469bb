"""Opening image files that nobody vouches for: Pillow, and no torch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mcic.untrusted import require_file

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI",
           "TGA", "TIFF", "WEBP")  # fmt: skip
"""what is read, whatever a file is called. Of the others that Pillow knows, EPS would start Ghostscript on the file;
the rest hold no photographs"""

_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    AssertionError, struct.error, zlib.error, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
"""what Pillow raises for a file that it cannot read"""

_ORIENTATION = 0x0112  # EXIF: 1 upright, 2…4 mirrored or upside down, 5…8 lying
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""what turns an image of each orientation the way a person sees it"""


@contextmanager
def opened(source: str | Path | BinaryIO, what: str) -> Iterator[Image.Image]:
    """The first frame of a file; whatever goes wrong inside becomes one ValueError with the file's name.

    Files whose header claims more than 178,956,970 pixels, Pillow's limit, are refused before anything is decoded.
    """
    try:
        if isinstance(source, str | Path):  # not a file that is open or in memory
            require_file(source)
        with Image.open(source, formats=_formats()) as image:
            yield image
    except _BROKEN as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"cannot read the {what} {source}: {str(reason) or type(error).__name__}") from error


def orientation(image: Image.Image) -> int:
    """What EXIF says, 1…8; 1 where it says no such number or is damaged, which makes the pixels no worse."""
    if image.format == "PNG":
        image.load()  # as the question for EXIF would: what is wrong with the pixels is to be heard
    try:
        number = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return number if number in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image, turned the way a person sees it.

    Not by `ImageOps.exif_transpose`, which writes the whole EXIF block anew and fails on tags of an odd type.
    """
    image.load()  # a TIFF turns itself, and then calls itself upright
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def readable_suffixes() -> frozenset[str]:
    """Lower-case file endings, with the dot, of the formats that are read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats())
