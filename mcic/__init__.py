"""MCIC: semantic segmentation networks from images and image-level tags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcic.ops import BuildInfo
    from mcic.predict import Predictor

__version__ = "0.1.0"


def build_info() -> BuildInfo:
    """What of the native code was built, with what, and why the rest was not; made to be printed."""
    from mcic import ops  # loads PyTorch, which importing the package does not

    return ops.build_info()


def load(path: str | Path, **settings: Any) -> Predictor:
    """The network of a run or of an exported folder: `mcic.load(path).predict("photo.jpg").save("mask.png")`.

    Args:
        path: a run folder, or one that `mcic export` wrote.
        settings: as for `mcic.predict.load`. device: auto | cpu | cuda | cuda:N. precision: fp32 | bf16 | fp16.
            protocol: single | voc | authors. tile: the largest side that is predicted at once, pixels. long_side: what
            an image's longer side is brought to, pixels, 0 for its own; unset: as in training.

    Raises:
        ValueError: no such folder, no finished network in it, or no such device.
    """
    from mcic import predict  # loads PyTorch

    return predict.load(path, **settings)
