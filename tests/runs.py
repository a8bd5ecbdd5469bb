"""Short runs for tests, and the golden run: `python tests/runs.py` writes its numbers anew."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from mcic.config import Config
from mcic.presets import preset
from mcic.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden" / "run.json"


def short(folder: Path, name: str = "shapes", **groups: dict[str, Any]) -> Config:
    """A preset cut down to seconds; `groups` overrides fields, e.g. `train={"epochs": 1}`."""
    config = preset(name)
    changes = {
        "data": {"train_images": 16, "val_images": 4, "workers": 0, "cache": str(folder.parent / "cache")},
        "train": {"epochs": 2, "batch_size": 4, "warmup_steps": 0},
        "eval": {"mask_images": 4},
        "run": {"dir": str(folder), "previews": 0, "tensorboard": False, "report": False, "device": "cpu"},
    }
    for group in changes.keys() | groups.keys():
        for field, value in (changes.get(group, {}) | groups.get(group, {})).items():
            setattr(getattr(config, group), field, value)
    return config


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def golden_run(folder: Path) -> dict[str, Any]:
    """Twelve steps of `shapes` on one thread: every total loss and the final scores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = short(
            folder,
            data={"train_images": 24},
            train={"epochs": 4, "batch_size": 8},
            method={"pool_threshold": 0.3, "ramp_epochs": 1.0, "entropy_weight": 0.3},
        )
        summary = Trainer(config).fit()
    finally:
        torch.set_num_threads(threads)
    scores = {name: value for name, value in summary.items() if "miou" in name}
    return {"loss/total": [line["loss/total"] for line in metrics(folder)], **scores}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(golden_run(Path(temporary) / "run"), indent=1) + "\n")
