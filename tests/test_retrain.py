"""The second stage: a plain network on saved masks."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import metrics, short

from mcic.checkpoint import checkpoints
from mcic.cli import main
from mcic.config_io import load_config, save_config
from mcic.data import build_data
from mcic.data.palette import voc_palette
from mcic.losses import segmentation_loss, weighted_segmentation_loss
from mcic.retrain import retrain_config
from mcic.trainer import Trainer


def save_masks(folder, dataset, *, ground_truth_used=False):
    """The ground truth as `mcic masks` would save it, sure of everything but the bottom half, where the labels lie."""
    for part in ("labels", "confidence"):
        (folder / part).mkdir(parents=True)
    for index, name in enumerate(dataset.ids):
        labels = dataset.mask(index).copy()
        confidence = np.full_like(labels, 255)
        half = len(labels) // 2
        labels[half:], confidence[half:] = 1, 0
        image = Image.fromarray(labels)
        image.putpalette(voc_palette(256).tobytes())
        image.save(folder / "labels" / f"{name}.png")
        Image.fromarray(confidence).save(folder / "confidence" / f"{name}.png")
    manifest = {"classes": ["background", *dataset.classes], "ground_truth_used": ground_truth_used}
    (folder / "masks.json").write_text(json.dumps(manifest))


@pytest.fixture
def first_stage(tmp_path):
    """A run that has masks, though it never trained."""
    config = short(tmp_path / "run").resolved()
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    save_masks(tmp_path / "run" / "masks", build_data(config.data).train)
    return tmp_path / "run"


def test_the_loss_weighs_pixels_with_their_confidence():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 5, (2, 6, 7), dtype=torch.uint8)
    mask[0, :2] = 255
    confidence = torch.rand(2, 6, 7, dtype=torch.float64)
    inside = mask != 255
    per_pixel = F.cross_entropy(logits, mask.long(), ignore_index=255, reduction="none")
    expected = (per_pixel * confidence)[inside].sum() / confidence[inside].sum()
    torch.testing.assert_close(weighted_segmentation_loss(logits, mask, confidence), expected)
    alike = weighted_segmentation_loss(logits, mask, torch.full_like(confidence, 0.3))
    torch.testing.assert_close(alike, segmentation_loss(logits, mask))
    nothing = weighted_segmentation_loss(logits, torch.full_like(mask, 255), confidence)
    assert nothing == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0


def test_a_network_is_trained_on_the_masks_alone(first_stage):
    assert main(["retrain", str(first_stage), "--train.epochs", "1"]) == 0
    folder = first_stage / "retrain"
    config = load_config(folder / "config.yaml")
    assert (config.method.supervision, config.train.epochs) == ("masks", 1)
    assert config.data.masks == str(first_stage / "masks")
    line = metrics(folder)[-1]
    assert "loss/classification" not in line
    assert line["loss/total"] == line["loss/segmentation"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["supervision"], summary["ground_truth_used"]) == ("masks", False)
    assert "val/miou_context" not in summary
    assert (folder / "checkpoints" / "network.safetensors").is_file()


def test_unsure_pixels_teach_nothing(first_stage):
    """The wrong labels of the bottom half have confidence 0: without them the gradient is the same."""
    gradients = []
    for wrong in (1, 3):
        for path in (first_stage / "masks" / "labels").glob("*.png"):
            with Image.open(path) as image:
                labels = np.array(image)
            labels[len(labels) // 2 :] = wrong
            Image.fromarray(labels).save(path)
        config = retrain_config(first_stage)
        config.train.scale = (1.0, 1.0)
        trainer = Trainer(config)
        (batch, *_) = trainer.loader.epoch(0)
        trainer.objective(trainer.model.train(), batch, torch.tensor(0.5)).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.network.parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_masks_chosen_with_ground_truth_are_named_so(first_stage):
    manifest = first_stage / "masks" / "masks.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ground_truth_used": True}))
    assert Trainer(retrain_config(first_stage)).fit()["ground_truth_used"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes the folder of a run"),
        (["nowhere"], "nowhere is no run folder"),
        (["RUN", "--data.masks", "gone"], "gone holds no finished masks: .* mcic masks RUN makes them"),
        (["RUN", "--trian.epochs", "1"], "did you mean '--train.epochs'"),
        (["RUN", "--method.supervision", "masks", "--data.masks", "None"], "needs --data.masks"),
    ],
)
def test_mistakes_are_named(first_stage, words, message, capsys):
    assert main(["retrain", *(str(first_stage) if word == "RUN" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (first_stage / "retrain").exists()


def test_a_second_stage_begins_where_the_first_did(tmp_path, caplog):
    """Of a backbone without weights of its own: what the run was started from, if it is still there."""
    source = Trainer(short(tmp_path / "source", train={"epochs": 1}, eval={"mask_images": 0}))
    source.fit()
    start = checkpoints(tmp_path / "source" / "checkpoints")[-1]
    config = short(tmp_path / "run", train={"epochs": 1}, run={"init_from": str(start)}).resolved()
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.yaml")
    save_masks(tmp_path / "run" / "masks", build_data(config.data).train)
    trainer = Trainer(retrain_config(tmp_path / "run"))
    weights = trainer.model.network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in source.model.network.state_dict().items())
    start.rename(tmp_path / "gone")
    assert retrain_config(tmp_path / "run").run.init_from is None
    assert "is gone: a second stage that begins now starts from random weights" in caplog.text
