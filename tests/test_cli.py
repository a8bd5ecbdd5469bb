"""The command line: flags, help, errors, exit codes."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.cells import cell_len

import mcic
from mcic.cli import main, run
from mcic.cli.args import parse_train
from mcic.cli.flags import flags, groups
from mcic.config import Config
from mcic.presets import PRESETS, preset

ROOT = Path(__file__).parent.parent


def parse(line: str) -> Config:
    return parse_train(line.split())


def help_lines(capsys, line: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def library(monkeypatch):
    """Puts a stand-in for a module of the library that a command imports."""

    def put(module: str, **names):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**names))

    return put


def fails_with(error: BaseException):
    def function(*args, **kwargs):
        raise error

    return function


class TestFlags:
    def test_the_preset_is_optional_and_first(self):
        assert parse("") == preset("shapes")
        assert parse("voc12-vgg16") == preset("voc12-vgg16")
        assert parse("--train.epochs 3").train.epochs == 3

    def test_flags_change_the_preset(self):
        config = parse(
            "coco14-vgg16 --method.attention-threshold 1 --train.lr=0.1 --train.no-flip --method.masks cam merged"
            " --train.scale 0.5 2 --data.root x --train.clip_grad 5 --data.workers None --method.merge-rule authors"
        )
        expected = preset("coco14-vgg16")
        expected.method.attention_threshold = 1.0
        expected.method.masks = ("cam", "merged")
        expected.method.merge_rule = "authors"
        expected.train.lr, expected.train.flip, expected.train.scale = 0.1, False, (0.5, 2.0)
        expected.train.clip_grad = 5.0
        expected.data.root = "x"
        assert config == expected

    def test_every_flag_is_accepted_with_its_value(self):
        """The table that help and checks are made from agrees with what tyro reads."""
        for name in PRESETS:
            words = []
            for flag in flags():
                value = getattr(getattr(preset(name), flag.group), flag.field)
                if flag.negative:
                    words.append(flag.name if value else flag.negative)
                else:
                    words += [flag.name, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
            assert parse_train([name, *words]) == preset(name)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("voc12-vg16", "did you mean 'voc12-vgg16'"),
            ("--method.attention-treshold 1", "did you mean '--method.attention-threshold'"),
            ("--lr 1", "did you mean '--train.lr'"),
            ("--zzzzzz 1", "there is no flag --zzzzzz; --help lists them"),
            ("--preset folder", "its name comes first"),
            ("--train.epochs 2 folder", "the preset comes first"),
            ("folder x", "expected a flag, got 'x'"),
            ("--model.backbone vgg61", "--model.backbone must be one of .*got 'vgg61'; did you mean 'vgg16'"),
            ("--model.backbone=vgg61", "did you mean 'vgg16'"),
            ("--method.masks cam mergd", "did you mean 'merged'"),
            ("--train.epochs two", "^--train.epochs must be a whole number, got 'two'$"),
            ("--train.lr fast", "^--train.lr must be a number, got 'fast'$"),
            ("--train.epochs", "takes 1 value, got none"),
            ("--train.scale 1", "takes 2 values, got 1"),
            ("--train.flip False", "takes no value, got 'False'; --train.no-flip switches it off"),
            ("--method.slots 0", "^--method.slots must be 1 or more, got 0$"),
            ("--method.masks", "^--method.masks must be one or more of cam, context, merged"),
            ("--train.batch-size 7 --train.accumulate 2", "^--train.batch-size must be a multiple of"),
            ("--help metod", "did you mean 'method'"),
        ],
    )
    def test_mistakes_are_named(self, line, message, capsys):
        with pytest.raises(ValueError, match=message):
            parse(line)
        assert capsys.readouterr() == ("", "")


class TestHelp:
    @pytest.mark.parametrize("width", [100, 110, 120])
    def test_everything_is_shown_within_the_width(self, capsys, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = help_lines(capsys, "--help")
        text = "\n".join(lines)
        assert max(map(cell_len, lines)) <= width
        for name in (*PRESETS, *groups(), *(flag.name for flag in flags() if not flag.negative)):
            assert name in text
        assert "--train.[no-]flip" in text

    @pytest.mark.parametrize("group", ["data", "model", "method", "train", "eval", "run"])
    def test_a_group_fits_on_a_screen(self, capsys, monkeypatch, group):
        monkeypatch.setenv("COLUMNS", "110")
        lines = help_lines(capsys, f"--help {group}")
        assert len(lines) <= 52
        shown = {line.split()[0] for line in lines if line.startswith("  --")}
        expected = {flag.name for flag in flags() if flag.group == group and not flag.negative}
        assert expected <= shown
        assert all(name.startswith(f"--{group}.") for name in shown)

    def test_the_values_are_the_presets(self, capsys):
        for name in ("shapes", "voc12-vgg16"):
            text = "\n".join(help_lines(capsys, f"{name} --help train"))
            assert f"[{preset(name).train.lr}]" in text

    def test_every_field_has_a_docstring(self):
        assert all(flag.help for flag in flags())

    def test_help_and_mistakes_need_no_torch(self):
        code = (
            "import sys; sys.argv = ['train.py', '--help']; import runpy\n"
            "try: runpy.run_path('train.py', run_name='__main__')\n"
            "except SystemExit as stop: assert not stop.code and 'torch' not in sys.modules, stop.code"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--train.epochs" in done.stdout


class TestMain:
    def test_train(self, library):
        made = []
        library("mcic.trainer", Trainer=lambda config: types.SimpleNamespace(fit=lambda: made.append(config)))
        assert main(["train", "folder", "--train.epochs", "1"]) == 0
        assert (made[0].preset, made[0].train.epochs) == ("folder", 1)

    def test_evaluate(self, library, tmp_path, capsys):
        (tmp_path / "config.yaml").touch()
        asked = {}

        def evaluate_run(run, **options):
            asked.update(run=run, **options)
            per_class = {"val": [50.0, None]}
            measured = {"checkpoint": "step-00000009", "split": "val", "images": 7}
            return {**measured, "val/miou": 61.234, "classes": ["background", "cat"], "per_class": per_class}

        library("mcic.evaluate", evaluate_run=evaluate_run)
        flags = ["--protocol", "voc", "--split", "train", "--checkpoint", "best", "--device", "cpu"]
        assert main(["evaluate", str(tmp_path), *flags]) == 0
        asked_for = {"checkpoint": "best", "protocol": "voc", "split": "train", "device": "cpu"}
        assert asked == {"run": tmp_path, **asked_for}
        cells = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
        assert ["val/miou", "61.23"] in cells
        assert ["background", "50.00", "val"] in cells
        assert ["cat", "–", "val"] in cells
        assert main(["evaluate", str(tmp_path)]) == 0
        assert asked == {"run": tmp_path, "checkpoint": "newest", "protocol": None, "split": "val", "device": None}

    def test_report(self, library, tmp_path, capsys):
        (tmp_path / "config.yaml").touch()
        library("mcic.report", write_report=lambda run, out=None: run / "report.html")
        assert main(["report", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")

    def test_a_folder_that_is_no_run(self, tmp_path, capsys):
        (tmp_path / "shapes-1").mkdir()
        (tmp_path / "shapes-1" / "config.yaml").touch()
        assert main(["report", str(tmp_path / "shape-1")]) == 2
        assert "did you mean 'shapes-1'" in capsys.readouterr().err

    def test_usage_and_version(self, capsys):
        assert main([]) == 2
        assert main(["--help"]) == 0
        assert main(["train", "--help"]) == 0
        assert "usage: mcic train" in capsys.readouterr().out
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"mcic {mcic.__version__}\n"

    def test_unknown_command(self, capsys):
        assert main(["evalute", "x"]) == 2
        assert "did you mean 'evaluate'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (ValueError("--data.root has no\n JPEGImages/"), "mcic: error: --data.root has no JPEGImages/"),
            (FileNotFoundError(2, "No such file or directory", "tags.csv"), "mcic: error: tags.csv: No such file"),
            (FileNotFoundError("no tags.csv"), "mcic: error: no tags.csv"),
            (ValueError(), "mcic: error: ValueError"),
        ],
    )
    def test_errors_are_one_line(self, library, capsys, monkeypatch, error, said):
        monkeypatch.delenv("MCIC_DEBUG", raising=False)
        library("mcic.trainer", Trainer=fails_with(error))
        assert main(["train"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(said)
        assert err.count("\n") == 1

    def test_debug_shows_the_traceback(self, library, capsys, monkeypatch):
        monkeypatch.setenv("MCIC_DEBUG", "1")
        library("mcic.trainer", Trainer=fails_with(ValueError("bad")))
        assert main(["train"]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.endswith("mcic: error: bad\n")

    def test_other_errors_are_ours(self, library):
        library("mcic.trainer", Trainer=fails_with(RuntimeError("a fault")))
        with pytest.raises(RuntimeError, match="a fault"):
            main(["train"])

    def test_interrupt(self, capsys):
        assert run("mcic", fails_with(KeyboardInterrupt()), []) == 130
        assert capsys.readouterr().err == "mcic: interrupted\n"

    def test_train_py_says_what_is_wrong(self):
        done = subprocess.run(
            [sys.executable, "train.py", "--method.slots", "0"],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MCIC_DEBUG": ""},
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "train.py: error: --method.slots must be 1 or more, got 0\n"
