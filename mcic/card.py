"""The model card of an exported network: what it is, what it was made from, how good it is, how to use it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mcic.measures import SCORES
from mcic.runfolder import finite, read_document

_SUPERVISION = {
    "tags": "image-level tags only: which classes an image shows, not where",
    "masks": "masks that a first stage made from image-level tags, with their confidence",
    "full": "ground-truth masks: this is a ceiling to compare with, not a network from tags",
}
_DATA = {"shapes": "procedural shapes on textured ground, made at run time", "voc12": "PASCAL VOC 2012",
         "coco14": "COCO 2014", "folder": "photographs of the person who trained it"}  # fmt: skip
_PRETRAINED = "ImageNet weights, trained on ImageNet's image labels"


def training_facts(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and summary of a run folder; what is not there, as in an exported folder, is empty.

    Raises:
        ValueError: a file is damaged; it is named.
    """
    config = read_document(model / "config.yaml", dict)
    for group in ("data", "method", "model", "train"):
        if not isinstance(config.get(group, {}), dict):
            raise ValueError(f"{model / 'config.yaml'} is damaged: {group} must be a mapping of settings")
    return config, read_document(model / "summary.json", dict)


def model_card(description: dict[str, Any], *, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """Markdown with the header that model hubs read.

    Args:
        description: the content of `network.json`, with contract and checks.
        config, summary: of `training_facts`.
    """
    environment = Environment(
        loader=PackageLoader("mcic"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    return environment.get_template("card.md").render(
        description=description,
        name=_name(config, description),
        facts=_facts(config, summary, description),
        scores=_scores(summary),
        classes=_classes(description, summary),
        checks=description["checks"],
        files={check["format"]: check["file"] for check in description["checks"]},
        protocol=summary.get("protocol"),
        from_tags=config.get("method", {}).get("supervision") in ("tags", "masks"),
    )


def _name(config: dict[str, Any], description: dict[str, Any]) -> str:
    data = config.get("data", {})
    source = Path(data["root"]).name if data.get("root") else data.get("name")
    return " · ".join(part for part in ("MCIC", description["backbone"], source) if part)


def _facts(config: dict[str, Any], summary: dict[str, Any], description: dict[str, Any]) -> list[tuple[str, str]]:
    """How it was trained, as far as the run says."""
    data, method, train = (config.get(group, {}) for group in ("data", "method", "train"))
    if not config:
        return [("Training", "not known: it was exported without its run")]
    weights = config.get("model", {}).get("weights", "none")
    start = {"none": "random", "imagenet": _PRETRAINED}.get(weights, f"weights from {Path(weights).name}")
    run = config.get("run")
    if isinstance(run, dict) and run.get("init_from"):
        start = f"those of an earlier training, {Path(run['init_from']).name}"
    facts = {
        "Data": _DATA.get(data.get("name"), str(data.get("name"))),
        "Supervision": _SUPERVISION.get(method.get("supervision", "tags"), str(method.get("supervision"))),
        "Ground truth used": _ground_truth(config, summary, description),
        "Network": f"{description['backbone']}, output stride {description['output_stride']}, "
        f"head {description['segmentation_head']}",
        "Initial weights": start,
        "Method": f"rules {method.get('rules')}, context {method.get('context')}, background evidence "
        f"{data.get('saliency')}",
        "Schedule": f"{train.get('epochs')} epochs, batch {train.get('batch_size')}, crop {train.get('size')}, "
        f"seed {train.get('seed')}",
    }
    return [(name, str(value)) for name, value in facts.items()]


def _ground_truth(config: dict[str, Any], summary: dict[str, Any], description: dict[str, Any]) -> str:
    """Whether masks drawn by people had a part in it beyond measuring."""
    used = summary.get("ground_truth_used", description.get("ground_truth_used"))
    if used is None and config:
        used = config.get("method", {}).get("supervision") == "full"
    if used is None:
        return "not known"
    return "yes, for training or for a choice on the way" if used else "no, for measuring only"


def _scores(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value in percent, on which images) of every mean IoU."""
    return [
        (measure.name, f"{value:.1f}", measure.measured_on(summary))
        for measure in SCORES
        if (value := finite(summary, measure.key)) is not None
    ]


def _classes(description: dict[str, Any], summary: dict[str, Any]) -> list[tuple[int, str, str, str]]:
    """(mask value, name, colour, IoU on val) of every class."""
    names = ["background", *description["classes"]]
    per_class = summary.get("per_class")
    ious = per_class.get("val") if isinstance(per_class, dict) else None
    if not isinstance(ious, list) or len(ious) != len(names):  # nobody measured, or not with these classes
        ious = [None] * len(names)
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in description["palette"]]
    shown = [f"{iou:.1f}" if isinstance(iou, int | float) else "–" for iou in ious]
    return list(zip(range(len(names)), names, colors, shown, strict=True))


def _cell(text: Any) -> str:
    """Text that a Markdown table takes as it is."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
