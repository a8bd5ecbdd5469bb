"""Training in double precision, for comparisons that leave no room for rounding: `torchrun tests/ranks.py FOLDER …`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from runs import short

from mcic import build, distributed
from mcic.log import setup_logging
from mcic.trainer import Trainer


def main(folder: str, *changes: str) -> None:
    """Train as `changes` say.

    killed_at=STEP, stopped_at=STEP, asked_at=STEP: once SIGKILL, SIGSTOP or SIGTERM for the last rank there
    asleep_at=STEP: once an hour of sleep for it
    nan_at=STEP: once its images hold a NaN
    apart=1: every rank sees a run folder of its own
    patience=SECONDS, epochs=NUMBER, accumulate=NUMBER, resume=auto: of the configuration
    """
    options = dict(change.split("=") for change in changes)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    build.PRECISIONS["fp32"] = torch.float64  # of the bank
    config = short(
        Path(folder),
        data={"train_images": 64, "saliency": "none"},
        train={
            "epochs": int(options.get("epochs", 7)),
            "batch_size": 8,
            "size": 33,
            "lr": 0.02,
            "accumulate": int(options.get("accumulate", 1)),
        },
        method={"dropout": 0.0, "pool_threshold": 0.2, "ramp_epochs": 2.0},
        eval={"mask_images": 8},
        run={
            "resume": options.get("resume", "none"),
            "checkpoint_every": 5,
            "rank_timeout": float(options.get("patience", 600)),
        },
    )
    if "apart" in options:
        config.run.dir = str(Path(folder) / os.environ["RANK"])
    setup_logging()
    trainer = Trainer(config)
    trainer.update.dtype = torch.float32  # no autocast
    step = trainer._train_step
    marker = Path(folder) / "disturbed"
    last = distributed.rank() == distributed.world_size() - 1
    signals = {"killed_at": signal.SIGKILL, "stopped_at": signal.SIGSTOP, "asked_at": signal.SIGTERM}

    def step_or_die(batch):
        for name in options if last and not marker.exists() else ():
            if name.endswith("_at") and trainer.step == int(options[name]):
                marker.touch()
                if name == "nan_at":
                    batch.images[0, 0, 5, 5] = torch.nan
                elif name == "asleep_at":
                    time.sleep(3600)
                else:
                    os.kill(os.getpid(), signals[name])
        return step(batch)

    trainer._train_step = step_or_die
    trainer.model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
