"""Figures reach the host in order, a fixed number of steps late, and no step waits for them."""

import os
import signal
import time

import pytest
import torch
from runs import metrics, short

from mcic.meter import Meter
from mcic.stop import Stopped
from mcic.trainer import Trainer

CPU = torch.device("cpu")


def put(meter, step, *, stop=False):
    meter.put(step, {"loss": torch.tensor(step / 2), "skipped": torch.tensor(0.0)}, {"lr": 0.1 * step}, stop=stop)


@pytest.mark.parametrize("lag", [0, 3])
def test_steps_come_late_in_order_and_all(lag):
    meter, seen = Meter(CPU, lag=lag), []
    meter.start()
    for step in range(1, 11):
        put(meter, step, stop=step == 4)
        for reading in meter.take():
            assert reading.step == step - lag
            seen.append(reading)
    seen += meter.take(all_=True)
    assert [reading.step for reading in seen] == list(range(1, 11))
    assert seen[6].metrics == {"loss": 3.5, "skipped": 0.0, "lr": pytest.approx(0.7)}
    assert [reading.step for reading in seen if reading.stop] == [4]
    assert not list(meter.take(all_=True))


def test_time_is_that_of_training():
    meter = Meter(CPU)
    meter.seconds = 5.0  # of the part before
    for step in (1, 2):
        meter.start()
        time.sleep(0.02)
        put(meter, step)
        (reading,) = meter.take()
        time.sleep(0.3)  # a checkpoint
    assert 5.04 <= reading.seconds == meter.seconds < 5.3


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_with_a_lag_leaves_the_same(tmp_path, every):
    """Lines, checkpoints and the end are those of a run without: what is on its way is waited for before a save."""
    lines, weights = [], []
    for lag in (0, 4):
        folder = tmp_path / f"lag-{lag}"
        trainer = Trainer(short(folder, train={"size": 33}, run={"checkpoint_every": 3, "log_every": every}))
        trainer.meter.lag = lag
        save, start, starts = trainer._save, trainer.meter.start, []
        trainer.meter.start = lambda start=start, starts=starts: (starts.append(None), start())

        def saving(log, *, trainer=trainer, folder=folder, save=save, **options):
            logged = [line["step"] for line in metrics(folder)]
            assert logged == [step for step in range(1, trainer.step + 1) if step % every == 0 or step == 8]
            save(log, **options)

        trainer._save = saving
        trainer.fit()
        assert len(starts) == 4  # two epochs, and after the saves within them
        timed = ("images_per_second", "memory_gib")
        lines.append([{k: v for k, v in line.items() if k not in timed} for line in metrics(folder)])
        assert all(line["images_per_second"] > 0 for line in metrics(folder))
        weights.append(trainer.model.state_dict())
    assert lines[0] == lines[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_stop_loses_no_line(tmp_path):
    config = short(tmp_path / "run", train={"size": 33}, run={"log_every": 1})
    trainer = Trainer(config)
    trainer.meter.lag = 4
    step = trainer._train_step

    def asked(batch):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer._train_step = asked
    with pytest.raises(Stopped):
        trainer.fit()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    config.run.resume = "auto"
    Trainer(config).fit()
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.gpu
def test_no_step_of_a_run_waits_for_the_gpu(tmp_path):
    """From the batch to the line in metrics.jsonl, once all is warm."""
    config = short(tmp_path / "run", data={"train_images": 40}, train={"epochs": 1}, run={"device": "cuda"})
    trainer = Trainer(config)
    step = trainer._train_step

    def watched(batch):
        if trainer.step in (4, 9):
            torch.cuda.set_sync_debug_mode("error" if trainer.step == 4 else "default")
        return step(batch)

    trainer._train_step = watched
    try:
        trainer.fit()  # a wait raises
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 11))
