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
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
FIGURES = (
    "loss/total",
    "loss/classification",
    "loss/segmentation",
    "loss/entropy",
    "loss/s_cam",
    "bank_fill",
    "grad_norm",
)


def command(folder, processes, *changes, restarts=0):
    """What runs `ranks.py`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, f"--max-restarts={restarts}", str(SCRIPT), str(folder), *changes]


def train(folder, processes, *changes, restarts=0, says=""):
    """Run `ranks.py`; returns its weights and bank, and its lines of metrics."""
    done = subprocess.run(
        command(folder, processes, *changes, restarts=restarts), capture_output=True, text=True, timeout=300, env=ENV
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout
    return load_file(checkpoints(folder / "checkpoints")[-1] / "model.safetensors"), metrics(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_equal_one_process(tmp_path, one, processes):
    """56 steps in fp64: losses, bank and weights to 1e-9, relative."""
    (weights, lines), (theirs, their_lines) = train(tmp_path / "run", processes), one
    assert [line["step"] for line in lines] == list(range(1, 57))
    assert theirs["memory.counts"].sum() > 50
    assert_close(weights, lines, theirs, their_lines)


def assert_close(weights, lines, theirs, their_lines):
    """Equal to 1e-9, relative."""
    for name in FIGURES:
        ours, expected = (
            torch.tensor([line[name] for line in run], dtype=torch.float64) for run in (lines, their_lines)
        )
        assert ((ours - expected).abs() <= 1e-9 * expected.abs()).all(), name
    assert weights.keys() == theirs.keys()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            assert (tensor - theirs[name]).norm() <= 1e-9 * theirs[name].norm(), name
        else:
            assert torch.equal(tensor, theirs[name]), name


def test_accumulation_over_ranks_equals_one_process(tmp_path):
    """All ranks share each micro-batch, so that its means, its pushes and what its images read are one process's."""
    changes = ("epochs=2", "accumulate=2")
    ours, theirs = (train(tmp_path / str(ranks), ranks, *changes) for ranks in (2, 1))
    assert [line["step"] for line in ours[1]] == list(range(1, 17))
    assert_close(*ours, *theirs)


def test_what_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path):
    _, lines = train(tmp_path / "run", 2, "epochs=1", "nan_at=3")
    assert [line["step"] for line in lines if line["skipped"]] == [4]
    assert [line["loss/total"] is None for line in lines] == [False] * 3 + [True] + [False] * 4
    kept = sorted(path.name for path in (tmp_path / "run" / "nonfinite").glob("*.safetensors"))
    assert kept == ["step-00000004-rank-0.safetensors", "step-00000004-rank-1.safetensors"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return train(tmp_path_factory.mktemp("two") / "run", 2)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["killed_at=23", "asked_at=22", "asleep_at=23 patience=4"])
def test_a_lost_rank_ends_the_others_and_the_run_goes_on(tmp_path, two, how):
    """torchrun starts all of them again, and the end is that of a run that nobody disturbed, bit for bit."""
    expected, lines = two
    weights, our_lines = train(tmp_path / "run", 2, *how.split(), "resume=auto", restarts=1)
    assert (tmp_path / "run" / "disturbed").exists()
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
    weights, lines = train(
        tmp_path / "run", 4, "resume=auto",
        says="was written by 2 processes, now there are 4: each computes 2 images of a batch, not 4",
    )  # fmt: skip
    assert [line["step"] for line in lines] == list(range(1, 57))
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            assert (tensor - one[0][name]).norm() <= 1e-9 * one[0][name].norm(), name


def test_a_folder_that_differs_between_machines_is_refused(tmp_path):
    (tmp_path / "run" / "0" / "checkpoints" / "step-00000008").mkdir(parents=True)
    done = subprocess.run(
        command(tmp_path / "run", 2, "resume=auto", "apart=1"), capture_output=True, text=True, timeout=300, env=ENV
    )
    assert done.returncode != 0
    assert done.stderr.count("is not the same on all machines: to resume, it must lie on a disk that they share") >= 2


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_hung_rank_is_named(tmp_path, ranks):
    """It is stopped from outside; the others end after the time that they may wait, and a few seconds."""
    marker, patience = tmp_path / "run" / "disturbed", 5
    arguments = command(tmp_path / "run", ranks, "stopped_at=12", f"patience={patience}")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, start_new_session=True
    ) as running:
        said = []
        for line in running.stdout:
            said.append(line)
            if "have waited" in line:
                late = time.time() - marker.stat().st_mtime
                break
        said.append(running.stdout.read())
    text = "".join(said)
    assert running.returncode != 0
    assert f"the other ranks have waited 5 s for rank {ranks - 1} (" in text
    assert text.count("have waited") == 1
    assert patience < late < patience + 5
    assert "exitcode  : 69" in text
    print(f"named {late:.1f} s after it stopped, with a patience of {patience} s")
