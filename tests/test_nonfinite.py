"""What is not finite never reaches the weights; the batch is kept; too many in a row end the run."""

import json

import pytest
import torch
from runs import metrics, short
from safetensors.torch import load_file

from mcic.checkpoint import checkpoints
from mcic.data import Batch
from mcic.trainer import Trainer


def poisoned(folder, steps, *, value=float("nan"), **groups):
    """A trainer whose batch holds `value` in the given steps (from 1), and for each step the state before and after."""
    groups.setdefault("train", {"epochs": 2})
    trainer = Trainer(short(folder, method={"pool_threshold": 0.2}, **groups))
    states, step = {}, trainer._train_step

    def spoiling(batch):
        if trainer.step + 1 in steps:
            batch.images[0, 0, 5, 5] = value
        before = state(trainer)
        figures = step(batch)
        states[trainer.step + 1] = (before, state(trainer))
        return figures

    trainer._train_step = spoiling
    return trainer, states


def state(trainer):
    """Weights, statistics, bank and what the optimizer keeps."""
    entries = enumerate(trainer.optimizer.state.values())
    kept = {f"{place}.{name}": value for place, entry in entries for name, value in entry.items()}
    return {name: tensor.clone() for name, tensor in (trainer.model.state_dict() | kept).items()}


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"train": {"epochs": 2, "precision": "fp16"}},
        {"train": {"epochs": 2, "accumulate": 2, "clip_grad": 1.0}},
        {"train": {"epochs": 2, "optimizer": "adamw", "lr": 1e-3}},
    ],
    ids=["fp32", "fp16 with a scaler", "accumulated and clipped", "adamw"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_update_is_skipped_whole(tmp_path, groups, value, caplog):
    trainer, states = poisoned(tmp_path / "run", {1, 6}, value=value, **groups)
    trainer.fit()
    for step, (before, after) in states.items():
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
        if step in (1, 6):
            changed = {name for name, equal in same.items() if not equal}
            assert all(name.startswith("memory.") for name in changed)  # finite contexts of the other images
        else:
            assert not same["network.segmentation_head.weight"] or groups.get("train", {}).get("precision") == "fp16"
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["skipped"]][:1] == [1]
    assert lines[5]["skipped"] == 1
    assert lines[5]["loss/total"] is None
    assert "step 6: the gradient is not finite (" in caplog.text
    assert "loss/classification" in caplog.text


def test_the_batch_is_kept_with_its_images_names(tmp_path, caplog):
    trainer, _ = poisoned(tmp_path / "run", {3})
    expected = trainer.loader.batch(0, 2)
    trainer.fit()
    kept = load_file(tmp_path / "run" / "nonfinite" / "step-00000003.safetensors")
    for name in Batch.__slots__:
        tensor = getattr(expected, name)
        assert (tensor is None and name not in kept) or torch.equal(kept[name], tensor), name
    facts = json.loads((tmp_path / "run" / "nonfinite" / "step-00000003.json").read_text())
    assert facts["images"] == [trainer.data.train.ids[index] for index in expected.indices.tolist()]
    assert "loss/total" in facts["not_finite"]
    assert facts["images"][0] in caplog.text


def test_a_batch_that_cannot_be_kept_ends_no_run(tmp_path, caplog):
    trainer, _ = poisoned(tmp_path / "run", {3})
    (tmp_path / "run" / "nonfinite").parent.mkdir()
    (tmp_path / "run" / "nonfinite").touch()
    trainer.fit()
    assert "nonfinite was not written (File exists): the run goes on without it" in caplog.text
    assert (tmp_path / "run" / "summary.json").is_file()


def test_overflows_of_fp16_have_more_patience_than_what_is_wrong(tmp_path):
    """While the loss is finite, the scale may fall from 2¹⁶ to 1 first; nothing is kept of such updates."""
    guard = Trainer(short(tmp_path / "run", train={"precision": "fp16", "max_nonfinite": 2})).guard
    guard.folder.parent.mkdir()
    overflow = {"skipped": 1.0, "loss/total": 1.0, "grad_norm": float("inf")}
    for step in range(1, 18):
        guard.check(step, overflow)
    assert not guard.folder.exists()
    with pytest.raises(ValueError, match="These are 18 in a row"):
        guard.check(18, overflow)
    guard.check(19, overflow | {"skipped": 0.0})
    guard.check(20, overflow | {"loss/total": float("nan")})
    with pytest.raises(ValueError, match="These are 2 in a row"):
        guard.check(21, overflow | {"loss/total": float("nan")})


def test_too_many_in_a_row_end_the_run_and_leave_it_whole(tmp_path):
    trainer, states = poisoned(tmp_path / "run", {3, 4, 5, 6}, train={"epochs": 2, "max_nonfinite": 3})
    with pytest.raises(ValueError, match=r"step 5: .*loss/total.*; images .*3 in a row \(--train\.max-nonfinite\)"):
        trainer.fit()
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000004"
    for name, tensor in load_file(path / "model.safetensors").items():
        assert torch.equal(tensor, states[3][0][name]) or name.startswith("memory."), name


def test_every_step_is_looked_at_where_only_some_are_logged(tmp_path, caplog):
    trainer, _ = poisoned(tmp_path / "run", {2, 3, 7}, run={"log_every": 4})
    trainer.fit()
    assert [int(path.stem[5:]) for path in sorted((tmp_path / "run" / "nonfinite").glob("*.json"))] == [2, 3, 7]


def test_a_count_goes_on_in_a_continued_run(tmp_path):
    trainer, _ = poisoned(tmp_path / "run", {3, 4}, train={"epochs": 1, "max_nonfinite": 3})
    trainer.fit()
    changes = {"train": {"epochs": 2, "max_nonfinite": 3}, "run": {"resume": "auto"}}
    again, _ = poisoned(tmp_path / "run", {5}, **changes)
    assert again.guard.streak == 2
    with pytest.raises(ValueError, match="in a row"):
        again.fit()
