"""The files of a folder of masks: written whole or not at all, and never among files of another kind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from mcic import distributed

SETTINGS, MANIFEST, COCO = "settings.json", "masks.json", "coco.json"
PARTS = ("labels", "confidence")
FORMAT = "mcic-masks"


def claim_folder(folder: Path, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` the place of masks with the settings `record`, for all ranks together.

    What is there with the same settings stays, unless `overwrite`: then all masks in it are removed.

    Raises:
        ValueError: it holds other files, or masks of other settings and not `overwrite`.
    """
    record = json.loads(json.dumps({"format": FORMAT, **record}))  # as it is read back: lists for tuples
    found = _settings(folder)
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files than masks: choose another --out")
    differing = [] if found is None or overwrite else [name for name in record if found.get(name) != record[name]]
    if differing:
        name = differing[0]
        raise ValueError(f"{folder} holds masks of other settings ({name} {found.get(name)}, now {record[name]}): "
                         "choose another --out, or --overwrite to make them anew")  # fmt: skip
    distributed.barrier()  # every rank has looked before the first one writes
    if distributed.rank() == 0:
        if overwrite:
            for old in (folder / MANIFEST, folder / COCO, *_pngs(folder)):
                old.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, record)  # first: what follows is ours
        for part in PARTS:
            (folder / part).mkdir(exist_ok=True)
    distributed.barrier()


def is_written(folder: Path, image_id: str) -> bool:
    """Whether the mask of an image is there."""
    return all((folder / part / f"{image_id}.png").is_file() for part in PARTS)


def write_png(path: Path, image: Image.Image) -> None:
    """Save under a temporary name, then rename."""
    temporary = path.with_name(f".rank-{distributed.rank()}.partial")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _settings(folder: Path) -> dict[str, Any] | None:
    """What the masks in the folder were made with; None where it is no folder of masks."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _pngs(folder: Path) -> list[Path]:
    return [file for part in PARTS for file in (folder / part).glob("*.png")]
