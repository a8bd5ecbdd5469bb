"""What a run is judged by: the scores of `summary.json` and the curves of `metrics.jsonl`, in plain words.

All IoUs and coverages are percent. `color` names a CSS custom property of the report, so that a mask has one colour
everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measure:
    """One mIoU.

    Attributes:
        key: its name in `summary.json`.
        name: as a person calls it.
        where: on which images.
        meaning: what it says, in a sentence or two.
        color: CSS custom property.
        per_class: its name in the `per_class` of `summary.json`, if it has one.
        coverage: name of the share of labelled pixels in `summary.json`, if it is a mask's.
    """

    key: str
    name: str
    where: str
    meaning: str
    color: str
    per_class: str | None = None
    coverage: str | None = None

    def measured_on(self, summary: dict[str, Any]) -> str:
        """On which images, and of a mask on how many, as far as the summary says."""
        count = summary.get("mask_images") if self.coverage else None
        return f"{count} {self.where}" if count else self.where


def _mask(slug: str, name: str, meaning: str) -> Measure:
    return Measure(
        key=f"train/mask_miou_{slug}",
        name=name,
        where="training images",
        meaning=meaning,
        color=slug,
        per_class=f"train_{slug}",
        coverage=f"train/mask_coverage_{slug}",
    )


NETWORK = Measure(
    key="val/miou",
    name="Network alone",
    where="validation images",
    meaning="The trained network on images it has never seen, given no tags and no memory: what you would deploy.",
    color="val",
    per_class="val",
)
WITH_TAGS = Measure(
    key="val/miou_tags",
    name="Network given the tags",
    where="validation images, tags given",
    meaning="The network alone, among the classes of the true tags: what the one with memory is to be compared with.",
    color="seg",
)
WITH_MEMORY = Measure(
    key="val/miou_context",
    name="Network with memory",
    where="validation images, tags given",
    meaning="The segmentation of features that have read from the memory, among the classes of the true tags.",
    color="context",
)
CAM = _mask("cam", "CAM mask", "Where the classification module sees each tag. It tends to stop at the telling parts.")
CONTROL = _mask("seg", "Control", "The context mask’s rule without the memory: what the network says on its own.")
CONTEXT = _mask(
    "context",
    "Context mask",
    "That rule after every pixel has read from other images: what it gains over the control, the memory gave.",
)
MERGED = _mask("merged", "Merged mask", "CAM and context mask where they agree or only one speaks; ignored elsewhere.")
MASKS = (CAM, CONTROL, CONTEXT, MERGED)
SCORES = (NETWORK, WITH_TAGS, WITH_MEMORY, *MASKS)


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, where) of every score in a summary, then speed and time: the table at the end of a run."""
    rows = []
    for measure in SCORES:
        value = summary.get(measure.key)
        if value is None:
            continue
        covered = summary.get(measure.coverage) if measure.coverage else None
        labels = "" if covered is None else f", labels {covered:.0f} % of the pixels"
        rows.append((measure.name, f"{value:.1f} mIoU", f"{measure.measured_on(summary)}{labels}"))
    if not rows:
        rows.append(("Quality", "–", "unknown: there are no ground-truth masks to measure with"))
    rows.append(("Training", f"{summary['seconds']:.0f} s", f"{summary['images_per_second']:.1f} images/s"))
    return rows


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of a figure: the key of its values, its name in the legend, its colour."""

    key: str
    name: str
    color: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """Curves that belong in one chart; `top` fixes the upper end of its axis."""

    title: str
    note: str
    curves: tuple[Curve, ...]
    top: float | None = None


TRAINING_FIGURES = (
    Figure("Loss terms", "The parts, and the total that is minimised.", (
        Curve("loss/total", "total", "ink"),
        Curve("loss/classification", "classification", "cam"),
        Curve("loss/segmentation", "segmentation", "val"),
        Curve("loss/entropy", "attention entropy", "entropy"),
    )),
    Figure("Segmentation loss by mask", "Solid: the network alone. Dashed: with the memory.", (
        Curve("loss/s_cam", "CAM", "cam"),
        Curve("loss/s_context", "context", "context"),
        Curve("loss/s_merged", "merged", "merged"),
        Curve("loss/c_cam", "CAM, memory", "cam", dashed=True),
        Curve("loss/c_context", "context, memory", "context", dashed=True),
        Curve("loss/c_merged", "merged, memory", "merged", dashed=True),
    )),
    Figure("Message beside feature", "Mean norms. A message near zero means that the memory says nothing.", (
        Curve("feature_norm", "feature", "seg"),
        Curve("message_norm", "message", "context"),
    )),
    Figure("Coverage", "Percent of the pixels that a mask labels; it ignores the rest.", (
        Curve("coverage/cam", "CAM mask", "cam"),
        Curve("coverage/context", "context mask", "context"),
        Curve("coverage/merged", "merged mask", "merged"),
    ), top=100.0),
    Figure("Ramp-up λ", "The weight of segmentation and entropy.", (Curve("lambda", "λ", "merged"),), top=1.0),
    Figure("Learning rate", "Of the pretrained layers.", (Curve("lr", "learning rate", "val"),)),
    Figure("Memory filled", "How much of the bank is in use.", (Curve("bank_fill", "bank fill", "context"),)),
    Figure("Gradient norm", "Before clipping.", (Curve("grad_norm", "gradient norm", "ink"),)),
    Figure("Speed", "Training images per second.", (Curve("images_per_second", "images/s", "val"),)),
)  # fmt: skip

EVALUATION_FIGURES = (
    Figure("Validation during training", "mIoU, percent.", (
        Curve("val/miou", "network alone", "val"),
        Curve("val/miou_tags", "given the tags", "seg", dashed=True),
        Curve("val/miou_context", "with memory, given the tags", "context", dashed=True),
    ), top=100.0),
)  # fmt: skip
