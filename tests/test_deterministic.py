"""Runs that are repeated to the bit, whatever computes them and whatever happens on the way."""

import json
import time
from itertools import pairwise

import pytest
import torch
from runs import metrics, short
from safetensors.torch import load_file

from mcic import trainer as trainer_module
from mcic.build import in_words
from mcic.checkpoint import checkpoints
from mcic.presets import preset
from mcic.trainer import Trainer

TIMES = ("images_per_second", "memory_gib")


@pytest.fixture(autouse=True)
def _as_before():
    """Deterministic mode is the process's."""
    yield
    torch.use_deterministic_algorithms(False)


def result(folder):
    """All numbers of a run: weights, bank, momentum, figures, evaluations, scaler."""
    newest = checkpoints(folder / "checkpoints")[-1]
    numbers = {}
    for part in ("model", "optimizer", "random"):
        tensors = load_file(newest / f"{part}.safetensors")
        numbers |= {f"{part}/{name}": tensor.flatten().view(torch.uint8) for name, tensor in tensors.items()}
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(folder)]
    scaler = json.loads((newest / "state.json").read_text())["scaler"]
    return numbers, lines, (folder / "evaluations.jsonl").read_text(), scaler


def assert_same(ours, theirs):
    assert ours[1:] == theirs[1:]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in theirs[0].items():
        assert torch.equal(ours[0][name], tensor), name


def small(folder, *, backend="auto", resume="none", **train):
    """A run with everything that draws or keeps numbers: dropout, moving average, augmentation, clipping."""
    size = 17 if backend == "triton" else 33  # its interpreter takes its time
    train = {"epochs": 2, "batch_size": 2, "size": size, "clip_grad": 1.0, "color_jitter": 0.3} | train
    return short(
        folder, data={"train_images": 6, "val_images": 2, "saliency": "none"}, train=train, eval={"mask_images": 2},
        method={"pool_threshold": 0.2, "ema_momentum": 0.9, "slots": 4},
        run={"backend": backend, "resume": resume, "checkpoint_every": 2},
    )  # fmt: skip


def interrupted(folder, after, **options):
    """Train, but die after so many updates; then go on until it is through."""
    trainer = Trainer(small(folder, **options))
    step = trainer._train_step

    def dying(batch):
        if trainer.step == after:
            raise KeyboardInterrupt
        return step(batch)

    trainer._train_step = dying
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    Trainer(small(folder, resume="auto", **options)).fit()


def poison(trainer, at):
    """Let the batch of one step hold what is not finite."""
    step = trainer._train_step

    def spoiling(batch):
        if trainer.step == at:
            batch.images[0, 0, 5, 5] = torch.inf
        return step(batch)

    trainer._train_step = spoiling


def test_two_runs_are_the_same_to_the_bit(tmp_path):
    for name in ("first", "second"):
        Trainer(small(tmp_path / name, deterministic=True)).fit()
    assert torch.are_deterministic_algorithms_enabled()
    assert_same(result(tmp_path / "first"), result(tmp_path / "second"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_on_a_gpu_are_the_same_to_the_bit(tmp_path, precision):
    for name in ("first", "second"):
        config = small(tmp_path / name, deterministic=True, precision=precision)
        config.run.device = "cuda"
        Trainer(config).fit()
    assert_same(result(tmp_path / "first"), result(tmp_path / "second"))


def test_an_operation_without_a_deterministic_form_is_refused_by_name(tmp_path):
    torch.use_deterministic_algorithms(True)
    values = torch.zeros(4)
    with (
        pytest.raises(ValueError, match=r"--train\.deterministic: put_ has no deterministic form on cpu; --train\.no-"),
        in_words(torch.device("cpu"), ""),
    ):
        values.put_(torch.tensor([0]), torch.ones(1))


def test_memory_that_is_not_there_is_an_advice():
    with (
        pytest.raises(ValueError, match="the memory of cpu does not hold this: take less"),
        in_words(torch.device("cpu"), "take less"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"), in_words(torch.device("cpu"), "take less"):
        torch.ones(2) + torch.ones(3)


@pytest.fixture(params=["reference", "native", "auto", "triton"])
def backend(request, monkeypatch):
    """Training alone: in the interpreter an evaluation of whole images would take minutes."""
    monkeypatch.setattr(trainer_module, "evaluate_network", lambda *arguments, **options: {})
    monkeypatch.setattr(trainer_module, "evaluate_masks", lambda *arguments, **options: {})
    return request.param


def test_every_backend_goes_on_as_if_nothing_had_happened(tmp_path, backend):
    epochs = 1 if backend == "triton" else 2
    Trainer(small(tmp_path / "whole", backend=backend, epochs=epochs)).fit()
    interrupted(tmp_path / "cut", 3 * epochs - 1, backend=backend, epochs=epochs)
    assert_same(result(tmp_path / "cut"), result(tmp_path / "whole"))


def test_adamw_goes_on_as_if_nothing_had_happened(tmp_path):
    adamw = {"optimizer": "adamw", "lr": 1e-3}
    Trainer(small(tmp_path / "whole", **adamw)).fit()
    interrupted(tmp_path / "cut", 4, **adamw)
    assert_same(result(tmp_path / "cut"), result(tmp_path / "whole"))


def test_every_backend_skips_what_is_not_finite(tmp_path, backend):
    trainer = Trainer(small(tmp_path / "run", backend=backend, epochs=1))
    poison(trainer, 1)
    trainer.fit()
    assert [bool(line["skipped"]) for line in metrics(tmp_path / "run")] == [False, True, False]
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values() if t.is_floating_point())


def scaled(folder, *, resume="none", dies_at=None):
    """Three epochs in fp16 with a scale that is too large at first and grows every third step."""
    trainer = Trainer(small(folder, precision="fp16", epochs=3, resume=resume))
    if resume == "none":
        trainer.scaler.load_state_dict(
            {"scale": 2.0**18, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 0}
        )
    step, scales = trainer._train_step, []

    def noting(batch):
        if trainer.step == dies_at:
            raise KeyboardInterrupt
        scales.append(trainer.scaler.get_scale())
        return step(batch)

    trainer._train_step = noting
    return trainer, scales


def test_the_scale_of_fp16_falls_grows_and_goes_on(tmp_path):
    """It falls by half with every update that is skipped, grows after three that are not, and a cut changes nothing."""
    whole, scales = scaled(tmp_path / "whole")
    whole.fit()
    skipped = [bool(line["skipped"]) for line in metrics(tmp_path / "whole")]
    assert skipped[0]
    assert not all(skipped)
    good = 0
    for was_skipped, before, after in zip(skipped[:-1], scales[:-1], scales[1:], strict=True):
        good = 0 if was_skipped else good + 1
        grown = good == 3
        assert after == before * (0.5 if was_skipped else 2 if grown else 1)
        good = 0 if grown else good
    assert max(after / before for before, after in pairwise(scales)) == 2
    for cut in (3, 5):
        trainer, _ = scaled(tmp_path / f"cut-{cut}", dies_at=cut)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        again, _ = scaled(tmp_path / f"cut-{cut}", resume="auto")
        assert again.step in (cut - 1, cut)
        again.fit()
        assert_same(result(tmp_path / f"cut-{cut}"), result(tmp_path / "whole"))


@pytest.mark.faults
def test_what_determinism_costs(tmp_path):
    """Steps of the preset `shapes` with and without, in turn."""
    config = preset("shapes")
    config.run.dir, config.run.device, config.data.cache = str(tmp_path / "run"), "cpu", str(tmp_path / "cache")
    trainer = Trainer(config)
    trainer.model.train()
    batch, ratios = next(trainer.loader.epoch(0)), []
    for pair in range(43):
        seconds = []
        for mode in (False, True) if pair % 2 else (True, False):
            torch.use_deterministic_algorithms(mode)
            started = time.perf_counter()
            trainer._train_step(batch)
            seconds.append((mode, time.perf_counter() - started))
        taken = dict(seconds)
        ratios += [taken[True] / taken[False]] if pair >= 3 else []
    middle = sorted(ratios)
    print(f"a step takes {middle[20]:.3f} times as long (quartiles {middle[10]:.3f} and {middle[30]:.3f}, 40 pairs)")
    assert middle[20] < 1.5
