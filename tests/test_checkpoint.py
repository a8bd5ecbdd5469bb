"""Checkpoints: whole or not there, verified when read, pruned only behind a good one; and files that are replaced."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from mcic import checkpoint, durable
from mcic.checkpoint import (
    MANIFEST,
    checkpoints,
    load_checkpoint,
    load_random_state,
    newest_good,
    save_checkpoint,
    verify_checkpoint,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return module.to(memory_format=torch.channels_last)


def fresh_optimizer(module: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True)


def optimizer_of(module: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    optimizer = fresh_optimizer(module, kind)
    module(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def parts():
    module = network()
    return module, optimizer_of(module)


def save(folder, parts, step, *, keep=2, **state):
    module, optimizer = parts
    return save_checkpoint(
        folder, step=step, model=module, optimizer=optimizer, state=state, keep=keep,
        random_states=[torch.get_rng_state(), torch.arange(5, dtype=torch.uint8)],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_was_saved_comes_back(tmp_path, kind):
    module = network()
    optimizer = optimizer_of(module, kind)
    random_state = torch.get_rng_state()
    path = save(tmp_path, (module, optimizer), 7, seconds=1.5)
    fresh = network()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    theirs = fresh_optimizer(fresh, kind)
    assert load_checkpoint(path, model=fresh, optimizer=theirs) == {"step": 7, "seconds": 1.5}
    for name, tensor in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    for ours, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert optimizer.state[ours].keys() == theirs.state[other].keys()
        for name, mine in optimizer.state[ours].items():
            read = theirs.state[other][name]
            assert torch.equal(mine, read)
            assert mine.stride() == read.stride()
            assert read.dim() == 0 or read.stride() == other.stride()
    assert torch.equal(load_random_state(path, 0), random_state)
    assert load_random_state(path, 1).tolist() == [0, 1, 2, 3, 4]
    assert load_random_state(path, 2) is None


@pytest.mark.parametrize(("saved", "loaded"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, saved, loaded):
    module = network()
    path = save(tmp_path, (module, optimizer_of(module, saved)), 7)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors does not fit this optimizer, (AdamW|SGD): its 0\."):
        load_checkpoint(path, model=module, optimizer=fresh_optimizer(module, loaded))


def test_the_newest_stay_and_the_best(tmp_path, parts):
    for step, score in enumerate([None, 30.0, 50.0, 40.0, None, None], 1):
        save(tmp_path, parts, step, score=score)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [3, 5, 6]


FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", MANIFEST)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, parts, name, damage, caplog):
    for step in (1, 2):
        save(tmp_path, parts, step)
    good, bad = checkpoints(tmp_path)
    damage(bad / name)
    assert newest_good(tmp_path) == good
    assert name in caplog.text
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_checkpoint(bad, model=parts[0])


def test_where_none_is_whole_nothing_is_begun_anew(tmp_path, parts):
    assert newest_good(tmp_path) is None
    save(tmp_path, parts, 1)
    flip(tmp_path / "step-00000001" / "model.safetensors")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .*model\.safetensors is damaged"):
        newest_good(tmp_path)


def test_shapes_and_dtypes_are_checked_before_a_tensor_is_read(tmp_path, parts, monkeypatch):
    path = save(tmp_path, parts, 1)
    monkeypatch.setattr(checkpoint, "load_file", None)
    with pytest.raises(
        ValueError, match=r"2 missing .*2 misfitting \(.*0\.weight is \[4, 3, 3, 3\] F32, expected \[5,"
    ):
        load_checkpoint(path, model=nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    with pytest.raises(ValueError, match=r"F32, expected \[4, 3, 3, 3\] BF16"):
        load_checkpoint(path, model=network().bfloat16())


@pytest.mark.parametrize("place", range(8))
def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, parts, monkeypatch, place):
    """The disk is full at the n-th file that is written or brought to the disk."""
    save(tmp_path, parts, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == place + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
    monkeypatch.setattr(durable, "sync", counted(durable.sync))
    with pytest.raises(
        OSError, match=r"step 2 could not be written .*No space left.* newest whole checkpoint is .*step-0+1"
    ):
        save(tmp_path, parts, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_vanished_does_not_come_back(tmp_path, parts):
    folder = tmp_path / "checkpoints"
    with pytest.raises(OSError, match=r"step 1 could not be written .*No such file.* there is no checkpoint yet"):
        save(folder, parts, 1)
    assert not folder.exists()


def test_what_a_killed_process_left_is_cleared_away(tmp_path, parts):
    debris = tmp_path / ".step-00000009.partial"
    debris.mkdir()
    (debris / "model.safetensors").write_bytes(b"half")
    assert newest_good(tmp_path) is None
    save(tmp_path, parts, 1)
    assert not debris.exists()


def test_a_checkpoint_of_the_same_step_is_replaced_by_the_same(tmp_path, parts):
    path = save(tmp_path, parts, 1)
    inode = path.stat().st_ino
    assert save(tmp_path, parts, 1) == path
    assert path.stat().st_ino == inode
    flip(path / "model.safetensors")
    save(tmp_path, parts, 1)
    verify_checkpoint(path)


def test_a_score_that_comes_later_is_stored(tmp_path, parts):
    """Stopped behind the last step of an epoch, the run is evaluated when it goes on."""
    save(tmp_path, parts, 1)
    path = save(tmp_path, parts, 1, score=50.0)
    assert load_checkpoint(path, model=parts[0]) == {"step": 1, "score": 50.0}
    for step in (2, 3, 4):
        save(tmp_path, parts, step, score=40.0)
    assert path in checkpoints(tmp_path)  # as the best


@pytest.mark.parametrize(
    "write", [durable.write_text, lambda path, text: durable.write_with(path, lambda p: p.write_text(text))]
)
def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch, write):
    path = tmp_path / "a.json"
    write(path, "old")
    monkeypatch.setattr(durable, "sync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_an_epoch_that_was_closed_since_is_written_down(tmp_path, parts):
    save(tmp_path, parts, 4, epoch_closed=False)
    path = save(tmp_path, parts, 4, epoch_closed=True)
    assert json.loads((path / "state.json").read_text())["epoch_closed"]


@pytest.mark.parametrize("survives", [True, False])
def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, parts, monkeypatch, survives):
    """The same step is saved again with the score that it lacked; nothing between two system calls may cost it."""
    first = save(tmp_path, parts, 4)
    replace = os.replace

    def die(source, target):
        if target == first and ".old." not in source.name:
            monkeypatch.setattr(durable, "restore_folder", durable.restore_folder if survives else lambda path: None)
            monkeypatch.setattr(durable, "remove", lambda path: None)  # a killed process tidies nothing
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, parts, 4, score=50.0)
    monkeypatch.undo()
    assert first.is_dir() == survives
    assert newest_good(tmp_path) == first
    verify_checkpoint(first)
    second = save(tmp_path, parts, 4, score=50.0)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
