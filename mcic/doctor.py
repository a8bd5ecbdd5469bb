"""The state of a folder of photographs before a run: what is in it, what a run would leave out, and what it would cost.

A `Trainer` is built as for the run, so what it would refuse is refused here, in the same words.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mcic.config import Config
from mcic.data import build_data
from mcic.data.folder import Contents
from mcic.data.shards import names_shards
from mcic.defaults import SETTLED
from mcic.doctor_data import Finding, findings
from mcic.doctor_estimate import Estimate, measure
from mcic.trainer import Trainer

CLEAN, LOOK, FAILS = 0, 1, 2
"""exit statuses: nothing to do; something is left out or deserves a look; training would fail"""


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How many images of each split show a class."""

    name: str
    train: int
    val: int


@dataclass(frozen=True, slots=True)
class Report:
    """The state of a folder.

    Attributes:
        root: the folder.
        train, val: number of usable images.
        held_out: whether val was split off, for want of a folder for it.
        tags_per_image: mean over the images.
        classes: one entry per class.
        findings: what was found, what is left out first.
        error: what training would refuse the folder with, or None.
        settings: what a run would choose, or None where it would fail.
        estimate: what a run would cost, or None where that was not asked for or training would fail.
    """

    root: Path
    train: int = 0
    val: int = 0
    held_out: bool = False
    tags_per_image: float = 0.0
    classes: tuple[ClassCount, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: str | None = None
    settings: dict[str, Any] | None = None
    estimate: Estimate | None = None

    @property
    def status(self) -> int:
        """`FAILS`, `LOOK` or `CLEAN`; notes alone are clean."""
        if self.error is not None:
            return FAILS
        return LOOK if any(finding.level != "note" for finding in self.findings) else CLEAN

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, with `status`."""
        return {"status": self.status, **dataclasses.asdict(self), "root": str(self.root)}


def examine(config: Config, *, estimate: bool = True) -> Report:
    """Read everything in `config.data.root` and say what is there.

    Args:
        config: of the run in question, its data set a `folder`.
        estimate: measure a few training steps as well.

    Raises:
        ValueError: the data set is none of one's own.
    """
    if config.data.name != "folder" or config.data.root is None:
        raise ValueError(f"only folders of photographs can be examined, got --data.name {config.data.name}")
    if names_shards(config.data.root):
        raise ValueError(f"mcic doctor examines folders of photographs, and {config.data.root} are tars: a run says at "
                         "its start what it leaves out of them")  # fmt: skip
    root = Path(config.data.root).expanduser().resolve()
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # huge images are a finding
        ours = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0, cache=cache))
        contents, settings, cost, error = None, None, None, None
        try:
            trainer = Trainer(ours)
            contents, settings = trainer.data.train.contents, _settings(trainer.config)
            cost = measure(trainer, workers=config.data.workers) if estimate else None
        except (ValueError, OSError, torch.OutOfMemoryError) as refusal:
            error = " ".join(str(refusal).split())
            contents = contents or _contents(ours)
        if contents is None:
            return Report(root, error=error)
        return _report(root, contents, error=error, settings=settings, estimate=cost)


def _contents(config: Config) -> Contents | None:
    """What is in the folder, though a run would fail on it; None if it cannot even be read."""
    try:
        return build_data(dataclasses.replace(config.data, max_bad_share=1.0)).train.contents
    except (ValueError, OSError):
        return None


def _report(root: Path, contents: Contents, **outcome: Any) -> Report:
    photos = [*contents.train, *contents.val]

    def count(split: list, name: str) -> int:
        return sum(name in photo.tags for photo in split)

    return Report(
        root,
        train=len(contents.train),
        val=len(contents.val),
        held_out=contents.held_out,
        tags_per_image=round(sum(len(photo.tags) for photo in photos) / len(photos), 2),
        classes=tuple(ClassCount(n, count(contents.train, n), count(contents.val, n)) for n in contents.classes),
        findings=tuple(findings(contents, root)),
        **outcome,
    )


def _settings(config: Config) -> dict[str, Any]:
    """What a run chooses from the data, with what else decides time and quality."""
    names = ("model.backbone", "data.saliency", *SETTLED)
    return {name.replace("_", "-"): getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names}
