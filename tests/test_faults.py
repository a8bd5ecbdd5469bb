"""Runs that are killed at any moment continue to the same end, bit for bit. Long: `make test-faults`."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import metrics, short
from safetensors.torch import load_file

from mcic import durable
from mcic.checkpoint import checkpoints, verify_checkpoint
from mcic.trainer import Trainer

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

TIMES = ("images_per_second", "memory_gib")
KILLS = 100


def config(folder, *, workers=0):
    settings = short(
        folder, data={"workers": workers, "saliency": "none"}, train={"epochs": 3, "batch_size": 4},
        method={"pool_threshold": 0.2, "ema_momentum": 0.9}, eval={"every": 1, "mask_images": 2},
        run={"checkpoint_every": 1, "resume": "auto"},
    )  # fmt: skip
    return settings


def train(folder: Path, workers: int = 0) -> None:
    Trainer(config(folder, workers=workers)).fit()


def in_child(action, *arguments) -> int:
    """Call `action` in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        torch.set_num_threads(1)
        action(*arguments)
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:
        os._exit(1)


def train_until_write(folder: Path, count: int) -> None:
    """Train, and be killed when the `count`-th file is to be brought to the disk."""
    calls, sync = 0, durable.sync

    def counted(path):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    durable.sync = counted
    train(folder)


def end_of(child: int) -> int:
    """Exit status; negative: the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def result(folder: Path) -> dict:
    """All that a run leaves which must not depend on how often it was interrupted."""
    newest = checkpoints(folder / "checkpoints")[-1]
    tensors = {}
    for part in ("model", "optimizer", "random"):
        tensors |= {f"{part}/{k}": v for k, v in load_file(newest / f"{part}.safetensors").items()}
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(folder)]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {"tensors": tensors, "metrics": lines, "evaluations": evaluations, "confusion": summary["confusion"]}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours["metrics"] == theirs["metrics"]
    assert ours["evaluations"] == theirs["evaluations"]
    assert ours["confusion"] == theirs["confusion"]
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(ours["tensors"][name], tensor), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nobody disturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    started = time.monotonic()
    assert end_of(in_child(train, folder)) == 0
    return result(folder), time.monotonic() - started


def assert_checkpoints_whole(folder: Path) -> None:
    for path in checkpoints(folder / "checkpoints"):
        verify_checkpoint(path)


def test_killed_at_random_it_ends_the_same(whole, tmp_path, record_property):
    """SIGKILL after a random time, again and again, until the run is through; then the next run; `KILLS` in all."""
    expected, seconds = whole
    chance = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run-{runs}"
        while True:
            child = in_child(train, folder, chance.choice((0, 0, 0, 1)))
            time.sleep(chance.uniform(0, 0.6 * seconds))
            os.kill(child, signal.SIGKILL)
            if end_of(child) == 0:  # it was through before
                break
            kills += 1
            assert_checkpoints_whole(folder)
        assert_same(result(folder), expected)
        runs += 1
    record_property("kills", kills)
    print(f"{kills} kills in {runs} runs: every checkpoint whole, every end the same, bit for bit")


def test_killed_at_every_write_of_a_checkpoint(whole, tmp_path):
    """Each file that is brought to the disk is once the last thing that a process does."""
    expected, _ = whole
    folder, place, finished = tmp_path / "run", 0, False
    while not finished:
        place += 1
        status = end_of(in_child(train_until_write, folder, 3 + place % 17))
        assert status in (0, -signal.SIGKILL)
        finished = status == 0
        assert_checkpoints_whole(folder)
        assert place < 200
    assert_same(result(folder), expected)
    print(f"{place - 1} kills within writes")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_it_saves_and_says_so(whole, tmp_path, number):
    expected, seconds = whole
    folder = tmp_path / "run"
    stops = attempts = 0
    while True:
        child = in_child(train, folder)
        time.sleep(0.25 * seconds + 0.1 * attempts)
        attempts += 1
        os.kill(child, number)
        asked = time.monotonic()
        status = end_of(child)
        assert time.monotonic() - asked < 30
        if status == 0:
            break
        if status in (-number, 130):
            continue  # before the training began there is nothing to save
        assert status == 75
        stops += 1
        assert_checkpoints_whole(folder)
    assert stops
    assert_same(result(folder), expected)
