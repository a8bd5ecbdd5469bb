"""Training in double precision, for comparisons that leave no room for rounding: `torchrun tests/ranks.py FOLDER …`."""

import os
import signal
import sys
from pathlib import Path

import torch
from runs import short

from mcic import build
from mcic.trainer import Trainer


def main(folder: str, *changes: str) -> None:
    """`changes`: killed_at=STEP kills the last rank there, once; resume=auto."""
    options = dict(change.split("=") for change in changes)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    build.PRECISIONS["fp32"] = torch.float64  # of the bank
    config = short(
        Path(folder),
        data={"train_images": 64, "saliency": "none"},
        train={"epochs": 7, "batch_size": 8, "size": 33, "lr": 0.02},
        method={"dropout": 0.0, "pool_threshold": 0.2, "ramp_epochs": 2.0},
        eval={"mask_images": 8},
        run={"resume": options.get("resume", "none"), "checkpoint_every": 5},
    )
    trainer = Trainer(config)
    trainer.update.dtype = torch.float32  # no autocast
    step = trainer._train_step
    marker = Path(folder) / "killed"

    def step_or_die(batch):
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if trainer.step == int(options.get("killed_at", -1)) and rank == ranks - 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch)

    trainer._train_step = step_or_die
    trainer.model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
