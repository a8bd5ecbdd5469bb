"""The files of a folder of masks: written whole or not at all, and never among files of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcic import distributed
from mcic.durable import remove_partials, write_text

SETTINGS, MANIFEST, COCO, OVERLAYS = "settings.json", "masks.json", "coco.json", "overlays"
PARTS = ("labels", "confidence")
FORMAT = "mcic-masks"

_MEANINGS = {
    "checkpoint": "another checkpoint", "weights": "other weights", "data": "other images, classes or tags",
}  # fmt: skip
"""what it means when an entry of the settings differs whose value says nothing to a person"""


def claim_folder(folder: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` the place of masks with the settings `record`, for all ranks together.

    What is there with the same settings stays, unless `overwrite`: then all masks in it are removed.

    Args:
        folder: made if need be.
        record: all that decides over the masks; `weights` and `data` in it are digests.
        overwrite: remove what is there.

    Raises:
        ValueError: it holds other files, or masks of other settings, weights or data and not `overwrite`.
    """
    record = json.loads(json.dumps({"format": FORMAT, **record}))  # as it is read back: lists for tuples
    found = _settings(folder)
    if found is None and any(path for path in folder.glob("*") if not path.name.startswith(".")):
        raise ValueError(f"{folder} holds other files than masks: choose another --out")
    differing = [] if found is None or overwrite else [name for name in record if found.get(name) != record[name]]
    if differing:
        name = differing[0]
        what = _MEANINGS.get(name, f"other settings ({name} {found.get(name)}, now {record[name]})")
        raise ValueError(f"{folder} holds masks of {what}: choose another --out, or --overwrite to make them anew")
    distributed.barrier()  # every rank has looked before the first one writes
    if distributed.rank() == 0:
        if overwrite:
            masks = [file for part in PARTS for file in (folder / part).glob("*.png")]
            drawn = [(folder / OVERLAYS / file.name).with_suffix(".jpg") for file in masks]
            for old in (folder / MANIFEST, folder / COCO, *drawn, *masks):
                old.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, record)  # first: what follows is ours
        for part in PARTS:
            (folder / part).mkdir(exist_ok=True)
        remove_partials(folder)
    distributed.barrier()


def is_written(folder: Path, image_id: str) -> bool:
    """Whether the mask of an image is there."""
    return all((folder / part / f"{image_id}.png").is_file() for part in PARTS)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def _settings(folder: Path) -> dict[str, Any] | None:
    """What the masks in the folder were made with; None where it is no folder of masks."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None
