"""MCIC: semantic segmentation networks from images and image-level tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcic.ops import BuildInfo

__version__ = "0.1.0"


def build_info() -> BuildInfo:
    """What of the native code was built, with what, and why the rest was not; made to be printed."""
    from mcic import ops  # loads PyTorch, which importing the package does not

    return ops.build_info()
