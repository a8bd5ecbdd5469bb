"""The ablation: rows that mean what they say, cells made once, statistics by hand, and a small grid from end to end."""

import csv
import dataclasses
import json
import os
import signal
import sys
import threading
import time

import pytest
from trees import make_folder

from bench import ablation, ablation_grid
from bench.ablation_grid import Cell, Grid, Machine, Runner
from bench.ablation_results import COLUMNS, Spread, Table, _curve, csv_text, paired, spread, write
from bench.ablation_rows import BASELINE, GROUPS, changed, chosen, difference, rows, same_as
from mcic.cli import run as as_command
from mcic.cli.args import parse_train
from mcic.config_io import load_config, save_config
from mcic.data import build_data
from mcic.data.shapes import Shapes
from mcic.presets import PRESETS, preset

ONE = Machine(1, 1, 0, ())
NAMES = [row.name for row in rows()]
TINY = ("--data.train-images", "12", "--data.val-images", "3", "--train.epochs", "1", "--train.batch-size", "4",
        "--eval.mask-images", "3", "--run.device", "cpu")  # fmt: skip


def run_ablation(*argv):
    return as_command("ablation", ablation.main, [*map(str, argv)])


# Rows


def test_names_and_groups():
    assert len(set(NAMES)) == len(NAMES)
    assert {row.group for row in rows()} == {"", *GROUPS}
    for place, row in enumerate(rows()):
        assert row.needs is None or row.needs in NAMES[:place], "what a row needs stands above it"


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_is_a_configuration_of_every_preset(name):
    baseline = preset(name)
    same = same_as(rows(), baseline)
    for row in rows():
        resolved = changed(baseline, row.changes).resolved()
        if row.kind == "run" and row.name not in same and row.name != BASELINE:
            assert resolved != baseline.resolved(), row.name
            assert difference(baseline.resolved(), changed(baseline, row.changes)), row.name


def test_flags_say_what_the_changes_are():
    """Reading a command line takes long, so rows that change different fields share one."""
    left = [row for row in rows() if row.kind == "run"]
    while left:
        together, changes = [], {}
        for row in left:
            if not row.changes.keys() & changes.keys():
                together.append(row)
                changes |= row.changes
        words = [word for row in together for word in row.flags]
        assert parse_train(["shapes", *words]) == changed(preset("shapes"), changes)
        left = [row for row in left if row not in together]


def test_rows_that_are_the_baseline_are_found():
    shapes, paper = same_as(rows(), preset("shapes")), same_as(rows(), preset("voc12-vgg16"))
    assert shapes["slots-32"] == BASELINE
    assert "slots-64" not in shapes
    assert paper["slots-64"] == paper["rules-paper"] == paper["merge-paper"] == BASELINE
    assert "slots-32" not in paper
    assert shapes["entropy-weight-paper"] == shapes["rules-paper"] == "bank-entropy"
    control = same_as(rows(), parse_train(["shapes", "--method.context", "self"]))
    assert control["control"] == BASELINE
    assert (control["control-masks-crf"], control["control-retrain-crf"]) == ("masks-crf", "retrain-crf")


def test_choosing_rows_brings_what_they_need():
    every = rows()
    assert [row.name for row in chosen(every, names=["control-retrain-crf"], groups=[])] == [
        BASELINE, "control", "control-masks-crf", "control-retrain-crf"
    ]  # fmt: skip
    assert {row.group for row in chosen(every, names=[], groups=["bank"])} == {"", "bank"}
    assert chosen(every, names=[], groups=[]) == every
    with pytest.raises(ValueError, match="no row 'slot-8'; did you mean 'slots-8'"):
        chosen(every, names=["slot-8"], groups=[])
    with pytest.raises(ValueError, match="no group 'banks'; did you mean 'bank'"):
        chosen(every, names=[], groups=["banks"])


def test_given_saliency_maps_are_a_row(tmp_path):
    (given,) = [row for row in rows(saliency=tmp_path) if row.name not in NAMES]
    assert given.flags == ("--data.saliency", str(tmp_path))


def test_differences_of_configurations(tmp_path):
    wanted = preset("folder")
    stored = changed(wanted.resolved(), {"train.epochs": 12, "train.size": 225, "data.workers": 3, "run.dir": "a"})
    assert difference(stored, wanted) is None, "what the data decides is taken as stored"
    assert difference(stored, changed(wanted, {"train.epochs": 6})) == "train.epochs 12, not 6"
    here = changed(stored, {"data.root": str(tmp_path)})
    assert difference(here, changed(wanted, {"data.root": os.path.relpath(tmp_path)})) is None
    assert difference(stored, changed(wanted, {"run.init_from": "b"})).startswith("run.init_from None, not ")
    begun = changed(stored, {"run.init_from": str(tmp_path)})
    assert difference(begun, changed(wanted, {"run.init_from": os.path.relpath(tmp_path)})) is None


# Statistics


def test_statistics_by_hand():
    assert spread([]) is None
    assert spread([2.0]) == Spread(2.0, None, 1)
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5), 3)  # (4 + 1 + 9) / 2
    # 13 - 10 and 14 - 12; seed 2 has no partner
    assert paired({0: 13.0, 1: 14.0, 2: 99.0}, {0: 10.0, 1: 12.0}) == Spread(2.5, pytest.approx(0.5**0.5), 2)
    assert paired({5: 1.0}, {0: 1.0}) is None
    assert [Spread(-1.25, 0.5, 2).text(signed=True), str(Spread(70.0, None, 1))] == ["−1.2 ± 0.5", "70.0"]


def cell_of(row, seed, score, **values):
    facts = {"group": row.group, "row": row.name, "seed": seed, "epochs": 1, "val/miou": score, "machine": "a box"}
    return dict.fromkeys(COLUMNS) | facts | values


def test_table_plots_and_csv(tmp_path):
    by_name = {row.name: row for row in rows()}
    scores = {BASELINE: [60.0, 62.0], "control": [59.0, 60.0], "slots-8": [61.0]}
    cells = [cell_of(by_name[name], seed, score, **{"train/mask_miou_cam": 50.0, "train/mask_coverage_cam": 80.0})
             for name, values in scores.items() for seed, score in enumerate(values)]  # fmt: skip
    cells.append(cell_of(by_name["masks-crf"], 0, None, **{"masks/miou": 55.0, "masks/labelled": 91.0}))
    for name, seed, scores in ((BASELINE, 0, (40.0, 60.0)), (BASELINE, 1, (42.0,)), ("control", 0, (1.0, 2.0))):
        run = tmp_path / name / str(seed)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("{}")
        (run / "metrics.jsonl").touch()
        lines = [
            json.dumps({"step": 3 * epoch, "epoch": epoch, "val/miou": score}) for epoch, score in enumerate(scores)
        ]
        (run / "evaluations.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert _curve([tmp_path / BASELINE / "0", tmp_path / BASELINE / "1"]) == {1: 41.0}
    (tmp_path / "control" / "1").symlink_to(tmp_path / "control" / "0")
    table = Table(cells, rows(), {"slots-32": BASELINE})
    write(table, tmp_path / "out", title="A title", command="python -m bench.ablation", runs=tmp_path)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| `baseline` | the preset as it stands | 61.0 ± 1.4 | – | 50.0 ± 0.0 (80) | 2 |" in page
    assert "| 59.5 ± 0.7 | −1.5 ± 0.7 | 50.0 ± 0.0 (80) | 2 |" in page
    assert "| 61.0 | +1.0 | 50.0 (80) | 1 |" in page
    assert "| 55.0 (91) | 1 |" in page
    assert "The same as `baseline` here, and not run again: `slots-32`." in page
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"], line["val/miou"]) for line in lines][:2] == [
        (BASELINE, "0", "60.0"), (BASELINE, "1", "62.0")
    ]  # fmt: skip
    assert csv_text(cells).count("\n") == 1 + len(cells)
    assert "control" in (tmp_path / "out" / "plot-differences.svg").read_text()
    epochs = (tmp_path / "out" / "plot-epochs.svg").read_text()
    assert "control" in epochs
    assert BASELINE not in epochs, "one seed of it was evaluated once only"


# Cells


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid whose cells take no time: a stub notes the call, and finishes or fails as its row's name says."""

    def command(self, cell, *, workers):
        folder, result = self.folder(cell), "masks/masks.json" if cell.row.kind == "masks" else "summary.json"
        config = changed(self.baseline, {**cell.row.changes, "train.seed": cell.seed}).resolved()
        save_config(config, folder / "config.yaml")
        code = (
            f"import pathlib, sys; f = pathlib.Path({str(folder)!r}); open({str(tmp_path / 'calls')!r}, 'a')"
            f".write('{cell}\\n'); print('a line'); {cell.row.name == 'control'} and sys.exit('no such weights\\n\\n');"
            f"p = f / {result!r}; p.parent.mkdir(exist_ok=True); p.write_text('{{}}')"
        )
        return [sys.executable, "-c", code]

    monkeypatch.setattr(Grid, "command", command)
    return Grid.of("shapes", [], rows=rows(), runs=tmp_path / "runs")


def make(grid, names, *, seeds=(0,), jobs=1, keep=False):
    cells = grid.cells(chosen(grid.rows, names=names, groups=[]), seeds)
    with ablation._locked(grid.runs) as lock:
        return Runner(grid, dataclasses.replace(ONE, jobs=jobs), lock, keep=keep).run(cells)


def calls(tmp_path):
    return (tmp_path / "calls").read_text().split()


def test_finished_cells_are_not_made_again(grid, tmp_path):
    assert make(grid, ["slots-8"]) == {}
    assert calls(tmp_path) == ["baseline/0", "slots-8/0"]
    (grid.runs / "slots-8" / "0" / "summary.json").unlink()
    make(grid, ["slots-8", "slots-32"], seeds=(0, 1))
    assert calls(tmp_path)[2:] == ["slots-8/0", "baseline/1", "slots-8/1"], "S = 32 is the baseline"
    assert [str(cell) for cell in grid.stored()] == ["baseline/0", "baseline/1", "slots-8/0", "slots-8/1"]


def test_a_chain_is_made_in_its_order(grid, tmp_path):
    assert make(grid, ["retrain-crf"], jobs=3) == {}
    chain = ["baseline/0", "masks-crf/0", "retrain-crf/0"]
    assert calls(tmp_path) == chain
    (grid.runs / BASELINE / "0" / "summary.json").unlink()
    make(grid, ["retrain-crf"])
    assert calls(tmp_path) == 2 * chain, "what was made from a run that is gone is not taken for finished"


def test_a_cell_that_fails_stops_no_other(grid, tmp_path, capsys):
    failures = make(grid, ["slots-8", "control-retrain-crf"], jobs=2)
    assert {str(cell): reason for cell, reason in failures.items()} == {
        "control/0": "exit status 1: no such weights",
        "control-masks-crf/0": "needs control/0, which failed",
        "control-retrain-crf/0": "needs control-masks-crf/0, which failed",
    }
    assert sorted(calls(tmp_path)) == ["baseline/0", "control/0", "slots-8/0"]
    assert "control/0: FAILED, exit status 1: no such weights" in capsys.readouterr().out


def test_only_checkpoints_that_a_row_needs_are_kept(grid):
    for name in (BASELINE, "slots-8", "slots-16"):
        (grid.runs / name / "0" / "checkpoints" / "step-00000001").mkdir(parents=True)
    make(grid, ["slots-8"])
    make(grid, ["slots-16"], keep=True)
    left = {path.parts[-4] for path in grid.runs.glob("*/*/checkpoints/step-*")}
    assert left == {BASELINE, "slots-16"}


def test_cells_of_other_settings_are_refused_and_made_anew_when_asked(grid, tmp_path):
    make(grid, ["masks-crf", "slots-8"])
    longer = Grid.of("shapes", ["--train.epochs", "30"], rows=rows(), runs=grid.runs)
    assert longer.stored() == []
    cells = longer.cells(chosen(rows(), names=["slots-8"], groups=[]), [0])
    with pytest.raises(ValueError, match=r"baseline/0 was made with train\.epochs 24, not 30: --redo"):
        ablation._check(longer, cells, redo=False)
    ablation._check(longer, cells, redo=True)
    assert not list(grid.runs.glob("*/*")), "the masks were made from the baseline's run"


def test_one_command_at_a_time(grid, tmp_path):
    grid.runs.mkdir()
    with ablation._locked(grid.runs), pytest.raises(ValueError, match="is being worked on"):
        make(grid, [])


def test_what_a_killed_command_left_running_keeps_the_folder(grid, monkeypatch):
    waits = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read(); import time; time.sleep(60)"]
    monkeypatch.setattr(Grid, "command", lambda *_, **__: waits)
    with ablation._locked(grid.runs) as lock:
        runner = Runner(grid, ONE, lock, keep=False)
        runner._start(Cell(rows()[0], 0))
    try:
        with pytest.raises(ValueError, match="is being worked on"), ablation._locked(grid.runs):
            pass
    finally:
        runner._stop()
    with ablation._locked(grid.runs):
        pass


def test_machine_shares_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(ablation_grid, "_gpus", lambda device: ("0", "3") if device == "auto" else ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(ablation_grid, "available_memory", lambda _: 9 * 2**30)
    machine = Machine.fit("auto", jobs=None, cells=20)
    assert (machine.jobs, machine.threads, machine.workers) == (2, 8, 7)
    assert [machine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == ["0", "3", "0"]
    assert Machine.fit("cpu", jobs=None, cells=20) == Machine(4, 4, 3, ())
    assert Machine.fit("cpu", jobs=None, cells=2) == Machine(2, 8, 7, ())
    assert Machine.fit("cpu", jobs=32, cells=2) == Machine(32, 1, 0, ())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Machine.fit("cpu", jobs=None, cells=2) == Machine(2, 3, 7, ())


# Data


def test_select_reads_no_validation_image(tmp_path, monkeypatch):
    ablation.write_shapes(tmp_path / "data", train=6, held_out=3)
    config = parse_train(["shapes", "--data.name", "folder", "--data.root", str(tmp_path / "data")])
    splits, stream, val = build_data(config.data), Shapes("train", count=9), Shapes("val", count=9)
    for part, offset in ((splits.train, 0), (splits.val, 6)):
        for place in range(len(part)):
            assert (part.image(place) == stream.image(offset + place)).all()
            assert (part.mask(place) == stream.mask(offset + place)).all()
            assert (part.tags[place] == stream.tags[offset + place]).all()
            assert not any((part.image(place) == val.image(other)).all() for other in range(9))
    assert splits.train.classes == stream.classes
    assert (len(splits.train), len(splits.val)) == (6, 3)
    options = ablation.parser().parse_args(["--data", str(tmp_path), "--select"])
    assert ablation._flags(options, ["--train.epochs", "6"]) == [
        "--data.root", str(tmp_path / "train"), "--train.epochs", "6"
    ]  # fmt: skip


def test_select_refuses_what_it_cannot_part(tmp_path, capsys):
    root = make_folder(tmp_path / "photos")
    common = ("--select", "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--rows", BASELINE, "--seeds", "0",
              "--", "--train.epochs", "1")  # fmt: skip
    assert run_ablation("--data", root / "train", *common) == 2
    assert "needs photographs with train/ apart from val/" in capsys.readouterr().err
    (root / "classes.txt").write_text("dog\ncat\nant\n")
    assert run_ablation("--data", root, *common) == 2
    assert "copy that file into train/" in capsys.readouterr().err
    assert run_ablation("--data", tmp_path / "none", *common) == 2
    assert "--data must be shapes or a folder" in capsys.readouterr().err


def test_a_mistake_leaves_nothing_behind(tmp_path, capsys):
    for argv in (("--rows", "slot-8"), ("--jobs", "0"), ("--", "--train.epoch", "1")):
        assert run_ablation("--out", tmp_path / "out", "--runs", tmp_path / "runs", *argv) == 2
    assert not list(tmp_path.iterdir())


def test_what_the_data_decides_is_chosen_once(tmp_path):
    root = make_folder(tmp_path / "photos")
    flags = ["--data.root", str(root), "--model.weights", "none", "--run.device", "cpu"]
    grid = Grid.of("folder", flags, rows=rows(), runs=tmp_path)
    settled = ablation._settled(grid)
    assert settled[::2] == [
        "--data.long-side",
        "--train.size",
        "--train.precision",
        "--train.batch-size",
        "--train.epochs",
    ]
    kept = json.loads((tmp_path / "settled.json").read_text())
    kept["values"]["train.epochs"] = 7
    (tmp_path / "settled.json").write_text(json.dumps(kept))
    assert ablation._settled(grid)[-1] == "7"
    assert (
        ablation._settled(Grid.of("folder", [*flags, "--train.epochs", "5"], rows=rows(), runs=tmp_path))
        == settled[:-2]
    )
    assert ablation._settled(grid) == settled  # what one command sets stays out of the next one's


def test_shown_commands_name_no_place():
    assert ablation._without_place("/a/b/photos") == "photos"
    assert ablation._without_place("../shared/photos") == "../shared/photos"


def test_a_calibration_is_to_be_given_as_its_value(tmp_path, capsys):
    where = ("--out", tmp_path / "out", "--runs", tmp_path / "runs")
    assert run_ablation(*where, "--", "--data.calibration", "run") == 2
    assert "give an ablation the value that was chosen, --method.background-power" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("grid")
def test_results_of_cells_that_are_not_here_stay(tmp_path, monkeypatch, capsys):
    """As in a fresh checkout, where the CSV is all that is left of the runs."""
    monkeypatch.setattr(ablation, "read_cell", lambda row, seed, _: cell_of(row, seed, 60.0))
    out = tmp_path / "out"
    common = ("--out", out, "--jobs", "1", "--seeds", "0")
    assert run_ablation(*common, "--runs", tmp_path / "runs", "--table-only") == 0
    assert "No cell is finished" in capsys.readouterr().out
    assert not out.exists()
    assert run_ablation(*common, "--runs", tmp_path / "runs", "--rows", "slots-8") == 0
    before = {path.name: path.read_text() for path in out.iterdir()}
    assert before["table.md"].startswith("# Ablation: out, preset shapes, measured on shapes\n")
    fresh = (*common, "--runs", tmp_path / "fresh", "--rows", "slots-16")
    assert run_ablation(*fresh) == 2
    said = capsys.readouterr().err
    assert "(1, slots-8/0 the first): another --out keeps both" in said, "the baseline would be made again"
    assert run_ablation(*fresh, "--table-only") == 2
    assert "(2, baseline/0 the first)" in capsys.readouterr().err
    make(Grid.of("shapes", [], rows=rows(), runs=tmp_path / "fresh"), [BASELINE])
    monkeypatch.setattr(Runner, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_ablation(*fresh, "slots-8") == 130
    assert "keeps its results, of more cells than the 1" in capsys.readouterr().out
    assert {path.name: path.read_text() for path in out.iterdir()} == before


# From end to end


def test_a_small_grid(tmp_path, capsys):
    """Two runs, their results, and nothing left to do for the same command again."""
    where = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    argv = (*where, "--rows", "slots-8", "slots-32", "--seeds", "0", "--jobs", "1", "--", *TINY)
    assert run_ablation(*argv) == 0, capsys.readouterr().out
    for name, slots in ((BASELINE, 32), ("slots-8", 8)):
        assert load_config(tmp_path / "runs" / name / "0" / "config.yaml").method.slots == slots
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"]) for line in lines] == [(BASELINE, "0"), ("slots-8", "0")]
    for line in lines:
        assert all(line[name] for name in ("val/miou", "val/miou_tags", "val/miou_context", "train/mask_miou_merged"))
        assert float(line["memory_gib"]) > 0
        assert float(line["seconds"]) > 0
        assert line["machine"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert str(tmp_path) not in page
    assert "| `slots-8` | S 8 |" in page
    before = (tmp_path / "runs" / "slots-8" / "0" / "env.json").stat().st_mtime_ns
    assert run_ablation(*argv) == 0
    assert (tmp_path / "runs" / "slots-8" / "0" / "env.json").stat().st_mtime_ns == before
    assert run_ablation(*where, "--table-only", "--", *TINY) == 0
    assert run_ablation(*where, "--rows", "slots-8", "--seeds", "0", "--", *TINY, "--train.lr", "0.2") == 2
    assert "was made with train.lr 0.1, not 0.2" in capsys.readouterr().err


@pytest.fixture
def _ctrl_c():
    """Ctrl-C as at a terminal: a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_stop_lets_the_cells_save(tmp_path, monkeypatch, capsys):
    """A cell is sent SIGTERM, by which a run saves (test_faults.py), and waited for."""
    started, saved = tmp_path / "started", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def save(*_): time.sleep(0.3); pathlib.Path({str(saved)!r}).touch(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    )
    monkeypatch.setattr(Grid, "command", lambda *_, **__: [sys.executable, "-c", code])

    def stop():
        end = time.monotonic() + 60
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.05)
        if started.exists():
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    where = ("--out", tmp_path / "out", "--runs", tmp_path / "runs", "--jobs", "1", "--rows", BASELINE)
    assert run_ablation(*where) == 130
    assert saved.exists()
    assert "Stopped; the same command goes on from there" in capsys.readouterr().out
