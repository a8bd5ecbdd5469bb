"""Whole runs, cut short: what they leave, that they continue, every data set and every option of the loop."""

import json
import shutil

import pytest
import torch
from PIL import Image
from runs import GOLDEN, golden_run, metrics, short
from trees import make_coco, make_folder, make_voc

from mcic.checkpoint import checkpoints, load_network, save_network
from mcic.cli import main
from mcic.config_io import load_config, save_config
from mcic.data import build_data
from mcic.evaluate import MASK_NAMES, evaluate_network, evaluate_run
from mcic.model import NetworkSpec, SegmentationNetwork
from mcic.model.backbones import build_backbone
from mcic.restore import restore_run
from mcic.stop import Stopped
from mcic.trainer import Trainer

SCORES = {
    "val/miou", "val/miou_context", "train/mask_miou_cam", "train/mask_miou_seg", "train/mask_miou_context",
    "train/mask_miou_merged", "train/mask_coverage_cam", "train/mask_coverage_context", "train/mask_coverage_merged",
}  # fmt: skip


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with everything it can write, and its trainer."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer = Trainer(short(folder, run={"previews": 2, "tensorboard": True, "report": True}, eval={"every": 1}))
    trainer.fit()
    return folder, trainer


def test_run_folder(finished):
    folder, trainer = finished
    names = {path.name for path in folder.iterdir()}
    expected = {
        "config.yaml", "env.json", "metrics.jsonl", "evaluations.jsonl", "tensorboard", "checkpoints", "previews",
        "summary.json", "report.html",
    }  # fmt: skip
    assert names == expected
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss/total", "loss/classification", "loss/s_cam", "lambda", "lr", "feature_norm", "message_norm"} <= lines[
        -1
    ].keys()
    assert {path.name for path in (folder / "previews").glob("*.png")} == {"epoch-001.png", "epoch-002.png"}
    assert load_config(folder / "config.yaml") == trainer.config


def test_summary(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert SCORES | {"images_per_second", "seconds", "backend", "per_class", "confusion", "classes"} <= summary.keys()
    assert all(0 <= summary[name] <= 100 for name in SCORES)
    assert summary["backend"].startswith("reference")
    assert len(summary["per_class"]["val"]) == len(summary["classes"]) == 7
    assert sum(map(sum, summary["confusion"])) == 4 * 97 * 97


def test_evaluation_of_a_stored_run_gives_the_same_scores(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    again = evaluate_run(folder)
    assert again["val/miou"] == pytest.approx(summary["val/miou"])
    assert again["val/miou_context"] == pytest.approx(summary["val/miou_context"])
    assert evaluate_run(folder, protocol="voc")["val/miou"] != pytest.approx(summary["val/miou"])


def test_stored_network_is_the_one_that_was_trained(finished):
    folder, trainer = finished
    network, card = load_network(folder / "checkpoints")
    trainer.model.eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        torch.testing.assert_close(network(images), trainer.model.network(images))
    assert card["classes"][0] == "striped"


def test_a_finished_run_is_left_alone(finished, capsys):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    config = load_config(folder / "config.yaml")
    config.run.resume = "auto"
    assert Trainer(config).fit()["val/miou"] is not None
    assert (folder / "metrics.jsonl").read_text() == before
    config.run.resume = "none"
    with pytest.raises(ValueError, match=r"already holds files.*--run.resume auto"):
        Trainer(config)


def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch):
    def config(name):
        return short(tmp_path / name, train={"epochs": 2, "batch_size": 4}, method={"pool_threshold": 0.2})

    whole = Trainer(config("whole"))
    whole.fit()
    cut = Trainer(config("cut"))
    end_epoch = Trainer._end_epoch

    def interrupt(self, epoch, log):
        end_epoch(self, epoch, log)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_end_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    monkeypatch.undo()
    resumed_config = config("cut")
    resumed_config.run.resume = "auto"
    resumed = Trainer(resumed_config)
    assert resumed.step == 4
    resumed.fit()
    assert_same(weights(whole), weights(resumed))
    assert [line["loss/total"] for line in metrics(tmp_path / "whole")] == [
        line["loss/total"] for line in metrics(tmp_path / "cut")
    ]


def test_init_from_takes_the_weights_and_a_new_bank(finished, tmp_path):
    folder, trainer = finished
    source = checkpoints(folder / "checkpoints")[-1]
    started = Trainer(short(tmp_path / "run", run={"init_from": str(source)}))
    ours, theirs = weights(started), weights(trainer)
    for name in theirs:
        if not name.startswith("memory."):
            assert torch.equal(ours[name], theirs[name]), name
    assert not started.model.memory.counts.any()
    network_only = Trainer(short(tmp_path / "other", run={"init_from": str(folder / "checkpoints")}))
    assert torch.equal(
        network_only.model.network.segmentation_head.weight, trainer.model.network.segmentation_head.weight
    )


def test_weights_of_another_model_are_refused_by_name(finished, tmp_path):
    folder, _ = finished
    source = checkpoints(folder / "checkpoints")[-1]
    with pytest.raises(ValueError, match=r"misfitting \(memory.entries is \[7, 32, 64\] F32, .* \[7, 8, 64\] F32"):
        Trainer(short(tmp_path / "run", method={"slots": 8}, run={"resume": str(source)}))


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"accumulate": 2, "clip_grad": 1.0, "lr_schedule": "epoch", "warmup_steps": 3, "epochs": 1}},
        {"train": {"precision": "bf16", "epochs": 1}, "method": {"ema_momentum": 0.9, "self_read": False}},
        {"method": {"pixel_bank": True, "heads": 4, "attention_threshold": 1.0}, "train": {"epochs": 1}},
        {"method": {"rules": "authors"}, "train": {"epochs": 1, "precision": "fp16"}, "eval": {"protocol": "authors"}},
        {"method": {"context": "self"}, "train": {"epochs": 1}},
        {"method": {"supervision": "full"}, "train": {"epochs": 1}, "data": {"saliency": "none"}},
        {"method": {"context_head": "classification", "stop_gradient": False}, "train": {"deterministic": True}},
    ],
    ids=["loop", "bf16", "bank", "authors in fp16", "control", "full", "deterministic"],
)
def test_options_train_to_the_end(tmp_path, groups):
    summary = Trainer(short(tmp_path / "run", **groups)).fit()
    torch.use_deterministic_algorithms(False)
    assert 0 <= summary["val/miou"] <= 100
    assert all(line["loss/total"] is not None for line in metrics(tmp_path / "run"))
    assert ("val/miou_context" in summary) == (
        groups.get("method", {}).get("context") != "self" and groups.get("method", {}).get("supervision") != "full"
    )


@pytest.mark.parametrize("name", ["voc12-vgg16", "coco14-resnet101", "folder"])
def test_presets_train_on_their_layouts(tmp_path, name):
    make = {"voc12-vgg16": make_voc, "coco14-resnet101": make_coco, "folder": make_folder}[name]
    root = make(tmp_path / "data")
    backbone = "vgg16" if name == "voc12-vgg16" else "tiny"
    config = short(
        tmp_path / "run", name, data={"root": str(root)}, train={"size": 33, "batch_size": 2, "epochs": 1},
        model={"backbone": backbone, "weights": "none", "output_stride": None, "segmentation_head": "linear"},
        run={"report": True, "previews": 1},
    )  # fmt: skip
    config.data.train_images = 2
    config.data.val_images = 2
    summary = Trainer(config).fit()
    assert len(summary["classes"]) == {"voc12-vgg16": 21, "coco14-resnet101": 4, "folder": 4}[name]
    assert summary["val/miou"] is not None
    assert (tmp_path / "run" / "report.html").is_file()


def test_command_line_trains_evaluates_and_reports(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = (
        "--data.train-images 8 --data.val-images 2 --data.saliency none --train.epochs 1 --train.batch-size 4 "
        f"--eval.mask-images 2 --run.previews 0 --run.no-tensorboard --run.dir {folder}"
    )
    assert main(["train", "shapes", *flags.split()]) == 0
    assert "Network alone" in capsys.readouterr().out
    assert main(["evaluate", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["train", "shapes", *flags.split()]) == 2
    assert "already holds files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"train": {"size": 96}},
            r"--train.size must be a multiple of the output stride 4 plus 1.*got 96, nearest is 97",
        ),
        ({"run": {"device": "cuda:99"}}, "--run.device cuda:99: this machine"),
        ({"run": {"device": "mps"}}, "--run.device must be auto, cpu, cuda or cuda:N, got 'mps'"),
        ({"train": {"batch_size": 32}}, "16 training images, fewer than one batch of 32"),
        ({"run": {"init_from": "nowhere"}}, "--run.init-from nowhere: expected a checkpoint folder"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, groups, message):
    with pytest.raises(ValueError, match=message):
        Trainer(short(tmp_path / "run", **groups))
    assert not (tmp_path / "run").exists()


def test_full_supervision_without_masks_is_refused(tmp_path):
    root = make_folder(tmp_path / "data")
    shutil.rmtree(root / "train" / "masks")
    config = short(
        tmp_path / "run", "folder", data={"root": str(root), "train_images": None, "saliency": "none"},
        train={"size": 33}, model={"backbone": "tiny", "weights": "none"}, method={"supervision": "full"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no training image has one"):
        Trainer(config)


def test_a_folder_without_masks_trains_and_says_that_quality_is_unknown(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    for part in ("train", "val"):
        shutil.rmtree(root / part / "masks")
    config = short(
        tmp_path / "run", "folder", data={"root": str(root), "train_images": None, "val_images": None},
        train={"size": 33, "epochs": 1}, model={"backbone": "tiny", "weights": "none"}, run={"report": True},
    )  # fmt: skip
    summary = Trainer(config).fit()
    assert summary["val/miou"] is None
    assert summary["train/mask_miou_cam"] is None
    assert "no ground-truth masks" in capsys.readouterr().out
    assert "Network" in (tmp_path / "run" / "report.html").read_text()


def test_more_epochs_continue_a_finished_run(tmp_path):
    Trainer(short(tmp_path / "run", train={"epochs": 1})).fit()
    longer = Trainer(short(tmp_path / "run", train={"epochs": 2}, run={"resume": "auto"}))
    assert longer.step == 4
    longer.fit()
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


def test_classes_that_moved_are_refused(tmp_path):
    """Class i of the network is a name in the data: when names change places, nothing is read as before."""
    root = make_folder(tmp_path / "data")
    changes = {
        "data": {"root": str(root), "train_images": None, "val_images": None}, "train": {"size": 33, "epochs": 1},
        "model": {"backbone": "tiny", "weights": "none"},
    }  # fmt: skip
    trainer = Trainer(short(tmp_path / "run", "folder", **changes))
    trainer.fit()
    classes = list(trainer.data.train.classes)
    (root / "classes.txt").write_text("\n".join(reversed(classes)))
    message = rf"of the classes {', '.join(classes)}; the data now have {', '.join(reversed(classes))}"
    with pytest.raises(ValueError, match=message):
        restore_run(tmp_path / "run")
    changes["train"]["epochs"] = 2
    with pytest.raises(ValueError, match=message):
        Trainer(short(tmp_path / "run", "folder", run={"resume": "auto"}, **changes))


def test_ground_truth_is_remembered_from_run_to_run(tmp_path):
    """A run on full masks, one that starts from its checkpoint, and one that starts from that one's network."""
    Trainer(short(tmp_path / "full", method={"supervision": "full"}, train={"epochs": 1})).fit()
    source = checkpoints(tmp_path / "full" / "checkpoints")[-1]
    changes = {"method": {"supervision": "full"}, "train": {"epochs": 1}}
    second = Trainer(short(tmp_path / "second", run={"init_from": str(source)}, **changes))
    assert second.fit()["ground_truth_used"]
    assert restore_run(tmp_path / "second").ground_truth_used
    network = str(tmp_path / "second" / "checkpoints")
    assert Trainer(short(tmp_path / "third", run={"init_from": network})).ground_truth_used
    assert not Trainer(short(tmp_path / "fourth")).ground_truth_used


def test_network_files_are_checked(tmp_path):
    spec = NetworkSpec("tiny", None, "linear", 4)
    save_network(tmp_path, SegmentationNetwork(spec), classes=("a", "b", "c"), palette=[[0, 0, 0]] * 4)
    card = json.loads((tmp_path / "network.json").read_text())
    (tmp_path / "network.json").write_text(json.dumps(card | {"num_classes": 5}))
    with pytest.raises(ValueError, match=r"segmentation_head.bias is \[4\] F32, expected \[5\] F32"):
        load_network(tmp_path)
    with pytest.raises(ValueError, match="holds no network"):
        load_network(tmp_path / "nowhere")


def test_golden_run(tmp_path):
    """Numbers of a fixed run. A change that moves them on purpose writes them anew: `python tests/runs.py`."""
    expected, actual = json.loads(GOLDEN.read_text()), golden_run(tmp_path / "run")
    assert actual["loss/total"][:6] == pytest.approx(expected["loss/total"][:6], rel=1e-3)
    assert actual["loss/total"] == pytest.approx(expected["loss/total"], rel=2e-2)
    for name, value in expected.items():
        if "miou" in name:
            assert actual[name] == pytest.approx(value, abs=1.0)


def test_a_finished_run_that_chose_its_epochs_is_left_alone(tmp_path, caplog):
    """The flags that started it leave the epochs to the data: asking again must not need them."""
    data = {"root": str(make_folder(tmp_path / "data")), "train_images": 4, "val_images": 2}
    groups = {
        "data": data, "train": {"size": 33, "batch_size": 4}, "eval": {"mask_images": 0},
        "model": {"backbone": "tiny", "weights": "none", "output_stride": None, "segmentation_head": "linear"},
    }  # fmt: skip
    first = short(tmp_path / "run", "folder", **groups)
    first.train.epochs = 1
    Trainer(first).fit()
    again = short(tmp_path / "run", "folder", **groups)
    again.train.epochs, again.run.resume = None, "auto"
    Trainer(again).fit()
    assert "is finished" in caplog.text


def test_a_run_never_goes_back_over_its_own_checkpoints(tmp_path):
    groups = {"train": {"epochs": 2}, "eval": {"mask_images": 0}}
    Trainer(short(tmp_path / "run", **groups)).fit()
    first, last = checkpoints(tmp_path / "run" / "checkpoints")
    back = short(tmp_path / "run", **groups)
    back.run.resume = str(first)
    with pytest.raises(ValueError, match=f"goes back behind {last.name} of the same run"):
        Trainer(back)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text("{}")
    back.run.dir = str(tmp_path / "other")
    with pytest.raises(ValueError, match="already holds files"):
        Trainer(back)
    back.run.dir = str(tmp_path / "new")
    Trainer(back).fit()
    assert [path.name for path in checkpoints(tmp_path / "new" / "checkpoints")] == [last.name]


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mcic.trainer.time.strftime", lambda form: "20260101-000000")
    groups = {"eval": {"mask_images": 0}, "run": {"dir": None}}
    configs = [short(tmp_path / "run", train={"epochs": 1, "seed": seed}, **groups) for seed in (0, 1)]
    trainers = [Trainer(config) for config in configs]  # both before one of them writes
    for trainer in trainers:
        trainer.fit()
    assert [str(trainer.folder) for trainer in trainers] == [
        "runs/shapes-20260101-000000", "runs/shapes-20260101-000000-2",
    ]  # fmt: skip
    assert [load_config(trainer.folder / "config.yaml").train.seed for trainer in trainers] == [0, 1]


def test_saliency_maps_are_needed_of_training_images_alone_and_before_training(tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    config = short(tmp_path / "run", data={"saliency": str(maps)}, train={"epochs": 1}, eval={"mask_images": 2})
    ids = build_data(config.data).train.ids
    for image_id in ids[1:]:
        Image.new("L", (8, 8), 128).save(maps / f"{image_id}.png")
    with pytest.raises(ValueError, match=f"lacks image {ids[0]}"):
        Trainer(config)
    Image.new("L", (8, 8), 128).save(maps / f"{ids[0]}.png")
    Trainer(config).fit()
    assert evaluate_run(tmp_path / "run")["val/miou"] is not None


def test_a_stop_while_evaluating_is_made_up_for(tmp_path, monkeypatch):
    config = short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 2})
    trainer = Trainer(config)

    def asked(*arguments, **options):
        trainer.stop.made = True
        return evaluate_network(*arguments, **options)

    monkeypatch.setattr("mcic.trainer.evaluate_network", asked)
    with pytest.raises(Stopped):
        trainer.fit()
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    again = short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 2})
    again.run.resume = "auto"
    assert Trainer(again).fit()["val/miou"] is not None


def test_a_run_that_died_between_checkpoint_and_network_writes_the_network(tmp_path, monkeypatch):
    """Else it would end with that of the epoch before."""
    config = short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 0})
    trainer = Trainer(config)
    monkeypatch.setattr(trainer, "_save_network", lambda: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.fit()
    again = short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 0})
    again.run.resume = "auto"
    trainer = Trainer(again)
    trainer.fit()
    network, _ = load_network(tmp_path / "run" / "checkpoints")
    assert_same(network.state_dict(), trainer.model.network.state_dict())


def test_a_run_goes_on_without_what_it_started_from_and_in_another_precision(finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints(finished[0] / "checkpoints")[-1], source)
    Trainer(short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 0}, run={"init_from": str(source)})).fit()
    shutil.rmtree(source)
    more = short(
        tmp_path / "run", train={"epochs": 2, "precision": "fp16"}, eval={"mask_images": 0},
        run={"init_from": str(source), "resume": "auto"},
    )  # fmt: skip
    assert Trainer(more).fit()["epochs"] == 2


def test_ground_truth_is_remembered_by_a_run_that_goes_on_from_a_checkpoint(tmp_path):
    full = {"context": "none", "supervision": "full"}
    Trainer(short(tmp_path / "full", method=full, train={"epochs": 1}, eval={"mask_images": 0})).fit()
    tags = short(tmp_path / "tags", method={"context": "none"}, train={"epochs": 2}, eval={"mask_images": 0})
    tags.run.resume = str(checkpoints(tmp_path / "full" / "checkpoints")[-1])
    assert Trainer(tags).fit()["ground_truth_used"]


def test_a_run_whose_folder_is_unnamed_never_meets_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mcic.trainer.time.strftime", lambda form: "20260101-000000")
    groups = {"train": {"epochs": 1}, "eval": {"mask_images": 0}}
    Trainer(short(tmp_path / "run", run={"dir": None}, **groups)).fit()
    for resume in ("none", "auto"):
        trainer = Trainer(short(tmp_path / "run", run={"dir": None, "resume": resume}, **groups))
        assert trainer.step == 0
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="runs"):
        trainer.fit()


def test_a_run_that_goes_on_needs_nothing_that_it_began_with(tmp_path):
    """Neither the weights' file nor the calibration's; the backbone keeps its rate, the method its threshold."""
    weights, calibration = tmp_path / "tiny.pth", tmp_path / "calibration.json"
    torch.save(build_backbone("tiny").state_dict(), weights)
    found = {"field": "background_power", "chosen": 0.5, "ground_truth_used": True}
    calibration.write_text(json.dumps(found))
    groups = {
        "model": {"weights": str(weights)}, "data": {"calibration": str(calibration)}, "eval": {"mask_images": 0},
    }  # fmt: skip
    first = Trainer(short(tmp_path / "run", train={"epochs": 1}, **groups))
    first.fit()
    weights.unlink()
    calibration.write_text(json.dumps(found | {"chosen": 3.0}))
    again = short(tmp_path / "run", train={"epochs": 2}, run={"resume": "auto"}, **groups)
    trainer = Trainer(again)
    assert trainer.config.method.background_power == 0.5
    assert trainer.ground_truth_used
    for ours, theirs in zip(trainer.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert (ours["initial_lr"], len(ours["params"])) == (theirs["initial_lr"], len(theirs["params"]))
    trainer.fit()


def test_while_a_finished_run_goes_on_it_has_no_scores(tmp_path):
    Trainer(short(tmp_path / "run", train={"epochs": 1}, eval={"mask_images": 0})).fit()
    trainer = Trainer(short(tmp_path / "run", train={"epochs": 2}, eval={"mask_images": 0}, run={"resume": "auto"}))
    trainer.stop.made = True  # asked at once
    with pytest.raises(Stopped):
        trainer.fit()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_start_of_other_classes_is_refused(finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished[0] / "checkpoints", source)
    card = json.loads((source / "network.json").read_text())
    (source / "network.json").write_text(json.dumps(card | {"classes": card["classes"][::-1]}))
    with pytest.raises(ValueError, match="is of the classes"):
        Trainer(short(tmp_path / "run", run={"init_from": str(source)}))


def test_a_start_from_weights_trains_at_the_small_rate(finished, tmp_path):
    config = short(tmp_path / "run", run={"init_from": str(finished[0] / "checkpoints")})
    assert Trainer(config).model.trained == ("network.backbone",)


@pytest.mark.parametrize(
    ("method", "expected"),
    [({"supervision": "full"}, {"cam", "seg"}), ({"context": "none"}, {"cam", "seg"}), ({}, set(MASK_NAMES))],
)
def test_masks_are_scored_that_the_run_trained(tmp_path, method, expected):
    summary = Trainer(short(tmp_path / "run", train={"epochs": 1}, method=method)).fit()
    assert {name.removeprefix("train/mask_miou_") for name in summary if "mask_miou" in name} == expected


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(finished, tmp_path):
    """With all that it was started from, and what that says of ground truth."""
    source = tmp_path / "source"
    shutil.copytree(finished[0] / "checkpoints", source)
    card = json.loads((source / "network.json").read_text())
    (source / "network.json").write_text(json.dumps(card | {"ground_truth_used": True}))
    config = short(tmp_path / "run", run={"init_from": str(source), "resume": "auto"})
    (tmp_path / "run").mkdir()
    save_config(config.resolved(), tmp_path / "run" / "config.yaml")
    trainer = Trainer(config)
    assert trainer.ground_truth_used
    network, _ = load_network(source)
    assert_same(network.state_dict(), trainer.model.network.state_dict())


def test_a_run_goes_on_with_its_epochs_only(tmp_path, caplog):
    Trainer(short(tmp_path / "run", train={"epochs": 1})).fit()
    steps = metrics(tmp_path / "run")[-1]["step"]
    with pytest.raises(ValueError, match=rf"{steps} steps an epoch, now there are {2 * steps}.*--run.init-from"):
        Trainer(short(tmp_path / "run", train={"epochs": 3, "batch_size": 2}, run={"resume": "auto"}))
    with caplog.at_level("INFO", "mcic"):
        Trainer(short(tmp_path / "run", train={"epochs": 2, "lr": 0.5}, run={"resume": "auto"}))
    said = [message for message in caplog.messages if "goes on with other settings" in message][-1]
    assert "--train.lr 0.5 (was" in said
    assert "--train.epochs 2 (was 1)" in said
    assert "--run" not in said


def test_a_run_whose_images_were_exchanged_says_so(tmp_path, caplog):
    root = make_folder(tmp_path / "data")
    changes = {
        "data": {"root": str(root), "train_images": None, "val_images": None}, "train": {"size": 33, "epochs": 1},
        "model": {"backbone": "tiny", "weights": "none"}, "eval": {"mask_images": 0},
    }  # fmt: skip
    Trainer(short(tmp_path / "run", "folder", **changes)).fit()
    changes["train"]["epochs"], changes["run"] = 2, {"resume": "auto"}
    Trainer(short(tmp_path / "run", "folder", **changes))
    assert "are not those of" not in caplog.text
    table = next(root.rglob("tags.csv"))
    image = next(path for path in sorted((table.parent / "images").iterdir()))
    image.rename(image.with_stem("another"))
    table.write_text(table.read_text().replace(image.stem, "another"))
    Trainer(short(tmp_path / "run", "folder", **changes))
    assert "the training images are not those of" in caplog.text


def test_an_average_begins_with_the_weights_of_a_checkpoint_that_has_none(finished, tmp_path):
    folder, _ = finished
    start = {"run": {"init_from": str(checkpoints(folder / "checkpoints")[-1])}, "method": {"ema_momentum": 0.99}}
    model = Trainer(short(tmp_path / "new", **start)).model
    assert_same(model.ema.state_dict(), model.network.state_dict())


def test_a_run_that_begins_anew_reads_its_calibration_anew(tmp_path):
    """Its threshold and what it says of ground truth are of one file."""
    file = tmp_path / "calibration.json"
    changes = {"data": {"calibration": str(file)}, "run": {"resume": "auto"}, "train": {"epochs": 1}}

    def calibrated(chosen, *, ground_truth_used):
        entries = {"field": "background_power", "chosen": chosen, "ground_truth_used": ground_truth_used}
        file.write_text(json.dumps(entries))
        return Trainer(short(tmp_path / "run", **changes))

    killed = calibrated(3.0, ground_truth_used=True)
    (tmp_path / "run").mkdir()
    save_config(killed.config, tmp_path / "run" / "config.yaml")
    begun = calibrated(0.5, ground_truth_used=False)
    assert (begun.config.method.background_power, begun.ground_truth_used) == (0.5, False)


def test_labels_out_of_range_are_said_at_checkpoints(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mcic.trainer.rejected_labels", lambda device: 3)
    Trainer(short(tmp_path / "run", train={"epochs": 1, "size": 33}, eval={"mask_images": 0})).fit()
    assert caplog.text.count("some contexts were not stored") == 1


def test_a_run_leaves_its_configuration_as_it_was(tmp_path, monkeypatch):
    """Else `dataclasses.replace` of one configuration could be trained once only."""
    monkeypatch.chdir(tmp_path)
    config = short(tmp_path / "run", train={"epochs": 1, "deterministic": True})
    config.run.dir = None
    Trainer(config)
    assert config.run.dir is None
    config.train.deterministic = False
    Trainer(config)
    assert not torch.are_deterministic_algorithms_enabled()


def test_several_processes_share_their_batch_norm(tmp_path, monkeypatch):
    monkeypatch.setattr("mcic.model.backbones.tiny.BatchNorm2d", torch.nn.BatchNorm2d)
    Trainer(short(tmp_path / "one"))
    monkeypatch.setattr("mcic.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^backbone\..* would normalise every process's images by themselves"):
        Trainer(short(tmp_path / "two"))
