"""Tars of samples, as webdataset writes them, and as it should not."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from trees import COLOURS, scene

CLASSES = ("ant", "cat", "dog")


def encoded(ending: str, value: Any) -> bytes:
    """A file's content: arrays as JPEG or PNG (masks with a palette), bytes and text as they are, JSON."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        image, file = Image.fromarray(value), io.BytesIO()
        if ending == "mask.png":
            image.putpalette(COLOURS.tobytes())
        image.save(file, "JPEG" if ending.endswith("jpg") else "PNG")
        return file.getvalue()
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def write_shard(path: Path, samples: Mapping[str, Mapping[str, Any]]) -> Path:
    """A tar of key → ending → content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, value in files.items():
                content = encoded(ending, value)
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def samples(name: str, count: int, *, start: int = 0) -> dict[str, dict[str, Any]]:
    """Images with one class each, JSON tags and masks."""
    made = {}
    for index in range(start, start + count):
        image, mask = scene(index, [1 + index % 3])
        made[f"{name}_{index:03d}"] = {"jpg": image, "json": {"tags": [CLASSES[index % 3]]}, "mask.png": mask}
    return made


def make_shards(root: Path, *, train: int = 24, val: int = 6, per_shard: int = 6) -> Path:
    """`train/` and `val/` below `root`, returned."""
    for part, count in (("train", train), ("val", val)):
        for number, start in enumerate(range(0, count, per_shard)):
            here = samples(part, min(per_shard, count - start), start=start)
            write_shard(root / part / f"{part}-{number:03d}.tar", here)
    return root
