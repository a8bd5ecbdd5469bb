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
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, struct.error, zlib.error, MemoryError,
    Image.DecompressionBombError,
)  # fmt: skip
"""what Pillow raises for a file that it cannot read"""


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


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def readable_suffixes() -> frozenset[str]:
    """Lower-case file endings, with the dot, of the formats that are read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats())
