"""Several processes compute what one does with the same global batch, and survive the death of one of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import metrics
from safetensors.torch import load_file

from mcic.checkpoint import checkpoints

SCRIPT = Path(__file__).parent / "ranks.py"
FIGURES = (
    "loss/total",
    "loss/classification",
    "loss/segmentation",
    "loss/entropy",
    "loss/s_cam",
    "bank_fill",
    "grad_norm",
)


def train(folder, processes, *changes, restarts=0):
    """Run `ranks.py`; returns its weights and bank, and its lines of metrics."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, f"--max-restarts={restarts}", str(SCRIPT), str(folder), *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(checkpoints(folder / "checkpoints")[-1] / "model.safetensors"), metrics(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_equal_one_process(tmp_path, one, processes):
    """56 steps in fp64: losses, bank and weights to 1e-9, relative."""
    (weights, lines), (theirs, their_lines) = train(tmp_path / "run", processes), one
    assert [line["step"] for line in lines] == list(range(1, 57))
    for name in FIGURES:
        ours, expected = (
            torch.tensor([line[name] for line in run], dtype=torch.float64) for run in (lines, their_lines)
        )
        assert ((ours - expected).abs() <= 1e-9 * expected.abs()).all(), name
    assert weights.keys() == theirs.keys()
    assert theirs["memory.counts"].sum() > 50
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            assert (tensor - theirs[name]).norm() <= 1e-9 * theirs[name].norm(), name
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.faults
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    """torchrun starts all of them again, and the end is that of a run that nobody disturbed, bit for bit."""
    expected, lines = train(tmp_path / "whole", 2)
    weights, our_lines = train(tmp_path / "killed", 2, "killed_at=23", "resume=auto", restarts=1)
    assert (tmp_path / "killed" / "killed").exists()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    timed = ("images_per_second", "memory_gib")
    assert [{k: v for k, v in line.items() if k not in timed} for line in our_lines] == [
        {k: v for k, v in line.items() if k not in timed} for line in lines
    ]


@pytest.mark.faults
def test_without_restarts_the_others_end_within_seconds(tmp_path):
    started = time.monotonic()
    with pytest.raises(AssertionError):
        train(tmp_path / "killed", 2, "killed_at=3")
    assert time.monotonic() - started < 90
    survivors = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not survivors


@pytest.mark.faults
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, one):
    """Killed with two ranks, continued with four: the same to rounding, for a batch is the same images then."""
    with pytest.raises(AssertionError):
        train(tmp_path / "run", 2, "killed_at=23")
    weights, lines = train(tmp_path / "run", 4, "resume=auto")
    assert [line["step"] for line in lines] == list(range(1, 57))
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            assert (tensor - one[0][name]).norm() <= 1e-9 * one[0][name].norm(), name
