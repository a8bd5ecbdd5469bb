"""What a run writes and prints."""

import io
import json
import logging
import math
import os
import signal
import subprocess

import pytest
from rich.console import Console

import mcic
from mcic import log as log_module
from mcic.environment import environment, git_commit
from mcic.log import RunLog, print_table, setup_logging
from mcic.stop import StopRequest

STEP = {
    "loss/total": 1.5, "loss/classification": 0.25, "loss/segmentation": 1.0, "loss/s_cam": 9.0, "lambda": 0.5,
    "lr": 1e-3, "images_per_second": 41.2, "memory_gib": 1.25,
}  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    return [line["step"] for line in lines(path)]


@pytest.fixture
def plain():
    return Console(file=io.StringIO(), width=40)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    return now


def open_log(folder, console, *, total=100, start=0, tensorboard=False):
    return RunLog(folder, tensorboard=tensorboard, total_steps=total, start_step=start, console=console)


class TestFiles:
    def test_one_line_a_step_at_once(self, tmp_path, plain):
        with open_log(tmp_path, plain) as log:
            log.step(1, 0, {"loss/total": 0.5, "count": 3})
            assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 0, "loss/total": 0.5, "count": 3}]
            log.evaluation(1, 0, {"val/miou": 40.0})
            assert lines(tmp_path / "evaluations.jsonl") == [{"step": 1, "epoch": 0, "val/miou": 40.0}]

    def test_what_is_not_finite_is_null(self, tmp_path, plain):
        with open_log(tmp_path, plain) as log:
            log.step(1, 0, {"a": math.nan, "b": math.inf, "c": -math.inf, "loss/total": math.nan})
            log.evaluation(1, 0, {"val/miou": None})

        def refuse(name):
            raise AssertionError(name)

        text = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(text, parse_constant=refuse) == {
            "step": 1, "epoch": 0, "a": None, "b": None, "c": None, "loss/total": None,
        }  # fmt: skip
        assert lines(tmp_path / "evaluations.jsonl")[0]["val/miou"] is None

    def test_resume_drops_what_came_after_the_checkpoint(self, tmp_path, plain):
        with open_log(tmp_path, plain) as log:
            for step in range(1, 8):
                log.step(step, 0, {"part": 1})
            log.evaluation(4, 0, {})
            log.evaluation(7, 0, {})
        with open_log(tmp_path, plain, start=4) as log:
            for step in range(5, 10):
                log.step(step, 0, {"part": 2})
        assert steps(tmp_path / "metrics.jsonl") == list(range(1, 10))
        assert [line["part"] for line in lines(tmp_path / "metrics.jsonl")] == [1] * 4 + [2] * 5
        assert steps(tmp_path / "evaluations.jsonl") == [4]

    @pytest.mark.parametrize("tail", [b'{"step": 3, "ep', b'{"step": 3}', b"\0\0\0\0", b'{"step": 3, "a": "\xc3'])
    def test_a_torn_line_is_repaired(self, tmp_path, plain, tail):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
        with open_log(tmp_path, plain, start=3) as log:
            log.step(4, 0, {})
        assert steps(path) == [1, 2, 4]
        assert not list(tmp_path.glob("*.tmp"))

    def test_a_new_run_begins_anew(self, tmp_path, plain):
        for _ in range(2):
            with open_log(tmp_path, plain) as log:
                log.step(1, 0, {})
        assert steps(tmp_path / "metrics.jsonl") == [1]

    def test_disabled_writes_nothing(self, tmp_path, capsys):
        folder = tmp_path / "run"
        with RunLog(folder, tensorboard=True, total_steps=3, enabled=False) as log:
            log.step(1, 0, STEP)
            log.evaluation(1, 0, STEP)
            log.message("hello")
            log.table("Results", [("a", "1", "")])
        assert not folder.exists()
        assert capsys.readouterr() == ("", "")

    def test_tensorboard(self, tmp_path, plain):
        with open_log(tmp_path, plain, tensorboard=True) as log:
            log.step(1, 0, {"loss/total": 0.5})
            log.evaluation(1, 0, {"val/miou": 40.0, "val/other": None})
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert set(events.Tags()["scalars"]) == {"loss/total", "val/miou"}
        assert events.Scalars("loss/total")[0].value == 0.5


class TestPlain:
    def test_a_line_says_it_all(self, tmp_path, plain, clock):
        with open_log(tmp_path, plain) as log:
            log.step(1, 0, {})
            clock[0] = 20.0
            log.step(11, 0, STEP)
        assert plain.file.getvalue().splitlines()[-1] == (
            "epoch 1  step 11/100  loss 1.500 (cls 0.250, seg 1.000)  λ 0.50  lr 1.00e-03  41.2 images/s  1.25 GiB"
            "  ETA 2:58"
        )

    def test_at_most_one_line_in_ten_seconds_and_one_an_epoch(self, tmp_path, plain, clock):
        with open_log(tmp_path, plain, total=60) as log:
            for step in range(1, 61):
                log.step(step, (step - 1) // 20, STEP)
                clock[0] += 1.0
        shown = [int(line.split("step ")[1].split("/")[0]) for line in plain.file.getvalue().splitlines()]
        assert shown == [1, 11, 20, 31, 40, 51, 60]

    def test_an_evaluation_follows_the_step_it_is_of(self, tmp_path, plain, clock):
        with open_log(tmp_path, plain) as log:
            log.step(1, 0, STEP)
            log.step(2, 0, STEP)
            log.evaluation(2, 0, {"val/miou": 41.234, "val/coverage": 99.0})
        text = plain.file.getvalue().splitlines()
        assert [line.split()[3] for line in text] == ["1/100", "2/100", "2"]
        assert text[-1] == "epoch 1  step 2  val/miou 41.23"

    def test_no_escape_codes_and_no_markup(self, tmp_path, plain):
        with open_log(tmp_path, plain) as log:
            log.message("a [bold]path[/] " + "x" * 100)
            log.step(1, 0, STEP)
        text = plain.file.getvalue()
        assert "\x1b" not in text
        assert text.startswith("a [bold]path[/] " + "x" * 100 + "\n")

    def test_hours(self, clock):
        eta = log_module._Eta(10_001)
        assert eta.text(1) == "-:--"
        clock[0] = 1.0
        assert eta.text(2) == "2:46:39"
        assert eta.text(10_001) == "0:00"


class TestTerminal:
    def test_bar_with_the_figures_below(self, tmp_path):
        console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
        with open_log(tmp_path, console) as log:
            log.message("getting ready")
            log.step(1, 0, STEP)
            log.step(50, 2, STEP)
            log.message("in between")
        text = console.file.getvalue()
        for fact in ("epoch 3", "50/100", "ETA 0:00", "loss 1.500 (cls 0.250", "λ 0.50", "41.2 images/s", "1.25 GiB"):
            assert fact in text
        assert text.index("getting ready") < text.index("50/100")
        assert "in between" in text

    def test_the_table_ends_the_bar(self, tmp_path):
        console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
        with open_log(tmp_path, console) as log:
            log.step(100, 0, STEP)
            log.table("Results", [("val/miou", "61.20", "network alone")])
            after = console.file.getvalue()
            log.message("Report: here")
        assert "network alone" in after
        assert console.file.getvalue().removeprefix(after) == "Report: here\n"


def test_table_is_not_narrow_where_there_is_no_terminal(capsys):
    print_table("Results", [("val/miou", "61.20", "x" * 90), ("[red]", "1", "")])
    text = capsys.readouterr().out
    assert "x" * 90 in text
    assert "[red]" in text


def test_logger(capsys):
    logger, other = logging.getLogger("mcic.some.module"), logging.getLogger("mcic")
    before = other.handlers, other.level, other.propagate
    try:
        setup_logging()
        setup_logging()
        logger.info("backend: %s", "reference")
        logger.warning("no weights")
        setup_logging(main=False)
        logger.info("unheard")
    finally:
        other.handlers, other.level, other.propagate = before
    assert capsys.readouterr().out == "backend: reference\nwarning: no weights\n"


class TestEnvironment:
    def test_facts(self):
        facts = environment()
        assert facts["mcic"] == mcic.__version__
        assert {"python", "torch", "numpy", "pillow", "platform", "cpu", "threads", "cuda_devices", "command"} <= set(
            facts
        )
        assert facts["threads"] >= 1
        assert facts["torch"][0].isdigit()
        json.dumps(facts, allow_nan=False)

    def test_commit_only_of_a_checkout_that_tracks_the_package(self, tmp_path, monkeypatch):
        monkeypatch.delenv("MCIC_COMMIT", raising=False)

        def git(*command):
            who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
            subprocess.run(["git", *who, "-C", str(tmp_path), *command], check=True, capture_output=True)

        package = tmp_path / "mcic"
        package.mkdir()
        (package / "__init__.py").write_text("")
        assert git_commit(package) is None
        monkeypatch.setenv("MCIC_COMMIT", "of a copy without .git")
        assert git_commit(package) == "of a copy without .git"
        monkeypatch.delenv("MCIC_COMMIT")
        git("init")
        (tmp_path / "other").write_text("")
        git("add", "other")
        git("commit", "-m", "other")
        assert git_commit(package) is None  # installed inside somebody else's checkout
        git("add", ".")
        git("commit", "-m", "package")
        commit = git_commit(package)
        assert len(commit) == 40
        (package / "__init__.py").write_text("x = 1")
        assert git_commit(package) == f"{commit}-dirty"


def test_a_stop_may_come_in_the_middle_of_a_line(capfd, monkeypatch):
    """What prints may be anywhere within a line when a signal comes: the handler must not enter it again."""
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda *_: pytest.fail("the log was entered"))
    with StopRequest() as stop:
        assert not stop.made
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.made
    assert capfd.readouterr().err == "SIGUSR1: finishing the step and saving\n"
