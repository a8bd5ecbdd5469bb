"""A font that has the letters of the classes' names: Pillow's own has little beyond ASCII."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache

from PIL import ImageFont

log = logging.getLogger(__name__)


def font_for(texts: Iterable[str], size: int) -> ImageFont.FreeTypeFont:
    """The font to draw these texts with, `size` in pixels: Pillow's own, DejaVu Sans, or the first of this machine's
    that has every letter; else the one that lacks the fewest, which a warning says once."""
    letters = frozenset(letter for text in texts for letter in text if not letter.isspace())
    if all(map(str.isascii, letters)):
        return ImageFont.load_default(size)
    return ImageFont.truetype(_best(letters), size)


@lru_cache(maxsize=64)
def _best(letters: frozenset[str]) -> str:
    """Path of a font file."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")  # comes with matplotlib
    # LastResort, which comes with matplotlib too, has a box for every letter there is.
    names = {entry.fname for entry in font_manager.fontManager.ttflist if not entry.name.startswith("Last Resort")}
    best, fewest = own, _lacks(own, letters)
    for path in sorted(names - {own}):
        if not fewest:
            break
        lacking = _lacks(path, letters)
        if len(lacking) < len(fewest):
            best, fewest = path, lacking
    if fewest:
        log.warning("no font of this machine has %s: pictures show boxes in their place; masks and tables are not "
                    "concerned", " ".join(sorted(fewest)[:10]))  # fmt: skip
    return best


def _lacks(path: str, letters: frozenset[str]) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        known = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):  # a font of a kind that cannot be read
        return letters
    return frozenset(letter for letter in letters if ord(letter) not in known)
