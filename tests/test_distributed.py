"""Two processes compute what one does with the same global batch."""

import subprocess
import sys
from pathlib import Path

import torch
from runs import metrics
from safetensors.torch import load_file

from mcic.checkpoint import checkpoints

TRAIN = str(Path(__file__).parent.parent / "train.py")
FLAGS = """
    shapes --data.train-images 16 --data.val-images 4 --data.saliency none --train.epochs 2 --train.batch-size 8
    --train.warmup-steps 0 --train.lr 0.01 --method.dropout 0 --method.pool-threshold 0.2 --eval.mask-images 4
    --run.previews 0 --run.no-tensorboard --run.no-report --run.device cpu
"""


def train(folder, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, TRAIN, *FLAGS.split(), "--run.dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(checkpoints(folder / "checkpoints")[-1] / "model.safetensors"), metrics(folder)


def test_two_ranks_equal_one(tmp_path):
    one, one_lines = train(tmp_path / "one", 1)
    two, two_lines = train(tmp_path / "two", 2)
    assert [line["step"] for line in two_lines] == [1, 2, 3, 4]
    for ours, theirs in zip(two_lines, one_lines, strict=True):
        for name in ("loss/total", "loss/classification", "loss/entropy", "loss/s_cam", "bank_fill", "grad_norm"):
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert torch.equal(one["memory.counts"], two["memory.counts"])
    assert torch.equal(one["memory.ids"], two["memory.ids"])
    assert one["memory.counts"].sum() > 0
    for name, weight in one.items():
        if weight.is_floating_point():
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
