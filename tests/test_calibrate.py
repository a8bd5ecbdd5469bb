"""The threshold chosen without masks, and with a few."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import short

from mcic.calibrate import FILE, POWERS, apply_calibration, calibrate, color_information, edge_contrast
from mcic.checkpoint import checkpoints
from mcic.cli import main
from mcic.data import eval_items
from mcic.evaluate import at_pixels
from mcic.pseudo import cam_mask
from mcic.restore import restore_run
from mcic.trainer import Trainer


class TestCriterion:
    """A red square of side 10 on blue ground, 40×40."""

    @pytest.fixture
    def scene(self):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[..., 2] = 200
        pixels[5:15, 5:15] = (200, 0, 0)
        return pixels

    @staticmethod
    def square(first, last, label=1):
        labels = np.zeros((40, 40), np.uint8)
        labels[first:last, first:last] = label
        return labels

    def test_the_mask_that_follows_the_colours_is_best(self, scene):
        sides = (4, 8, 10, 12, 18)
        masks = [self.square(10 - side // 2, 10 + side // 2, label=3) for side in sides]
        for measure in (color_information, edge_contrast):
            scores = [measure(mask, scene) for mask in masks]
            assert np.argmax(scores) == 2
            assert scores[:3] == sorted(scores[:3])
            assert scores[2:] == sorted(scores[2:], reverse=True)

    def test_information_by_hand(self, scene):
        """Half of the square is labelled: p(label) 1/32, p(red) 1/16, p(both) 1/32."""
        labels = self.square(5, 15)
        labels[10:] = 0

        def entropy(*shares):
            return -sum(share * np.log(share) for share in shares)

        mask, colors, joint = entropy(1 / 32, 31 / 32), entropy(1 / 16, 15 / 16), entropy(1 / 32, 1 / 32, 30 / 32)
        assert color_information(labels, scene) == pytest.approx(mask + colors - joint)

    def test_contrast_by_hand(self, scene):
        """40 of 3120 pairs of neighbours differ: those at the square's border."""
        assert edge_contrast(self.square(5, 15), scene) == pytest.approx(3120 / 40)
        labels = self.square(5, 15)
        labels[10:15, 5:15] = 0  # the upper half: 20 of its 30 border pairs are borders of the square
        assert edge_contrast(labels, scene) == pytest.approx(20 / 30 * 3120 / 40)

    def test_one_label_or_one_colour_says_nothing(self, scene):
        for measure in (color_information, edge_contrast):
            assert measure(np.ones((40, 40), np.uint8), scene) == pytest.approx(0)
            assert measure(self.square(5, 15), np.zeros_like(scene)) == pytest.approx(0)

    def test_ignored_pixels_are_background(self, scene):
        labels = self.square(5, 15)
        ignored = labels.copy()
        ignored[20:] = 255
        for measure in (color_information, edge_contrast):
            assert measure(ignored, scene) == measure(labels, scene)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate") / "run"
    Trainer(short(folder)).fit()
    return folder


def annotate(run, folder, *, power, count=4):
    """The CAM masks of some training images under α = power, as if a person had drawn them."""
    folder.mkdir()
    restored = restore_run(run)
    for item in eval_items(restored.data.train, restored.saliency, indices=range(count)):
        with torch.no_grad():
            heatmap = at_pixels(restored.model, item.image[None], item.tags[None]).prediction.heatmap
        mask = cam_mask(heatmap, item.tags[None], item.saliency[None], threshold=0.0, background_power=power)
        Image.fromarray(mask[0].numpy()).save(folder / f"{restored.data.train.ids[item.index]}.png")


def test_without_masks_the_most_informative_value_is_kept(run):
    result = calibrate(run)
    assert tuple(result.scores) == POWERS
    assert result.scores[result.chosen] == max(result.scores.values())
    assert len(set(result.scores.values())) > 1
    assert not result.ground_truth_used
    stored = json.loads((run / FILE).read_text())
    assert (stored["field"], stored["chosen"], stored["current"]) == ("background_power", result.chosen, 1.5)


def test_annotated_images_choose_by_their_masks_and_the_next_run_says_so(run, tmp_path, capsys):
    annotate(run, tmp_path / "drawn", power=3.0)
    assert main(["calibrate", str(run), "--masks", str(tmp_path / "drawn")]) == 0
    assert re.search(r"background-power 3 .* 100\.0 .* best", capsys.readouterr().out)
    config = short(tmp_path / "next", train={"epochs": 1})
    config.data.calibration = str(run)
    trainer = Trainer(config)
    assert trainer.config.method.background_power == 3.0
    assert trainer.fit()["ground_truth_used"] is True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder: expected index PNGs"),
        (lambda folder: folder.mkdir(), "has no mask of a training image: expected names like"),
    ],
)
def test_masks_that_fit_nothing_are_refused(run, tmp_path, make, message, capsys):
    make(tmp_path / "drawn")
    assert main(["calibrate", str(run), "--masks", str(tmp_path / "drawn")]) == 2
    assert message in capsys.readouterr().err


def test_a_mask_of_the_wrong_size_or_value_is_refused(run, tmp_path):
    annotate(run, tmp_path / "drawn", power=1.0, count=1)
    (path,) = (tmp_path / "drawn").glob("*.png")
    Image.fromarray(np.full((97, 97), 99, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"has the value 99: expected 0…6 or 255"):
        calibrate(run, masks=tmp_path / "drawn")
    Image.fromarray(np.zeros((97, 50), np.uint8)).save(path)
    with pytest.raises(ValueError, match="is 50×97, its image 97×97"):
        calibrate(run, masks=tmp_path / "drawn")
    Image.fromarray(np.zeros((194, 194), np.uint8)).save(path)
    with pytest.raises(ValueError, match="is 194×194, its image 97×97"):
        calibrate(run, masks=tmp_path / "drawn")


@pytest.mark.parametrize("content", [None, "{}", '{"field": "lr", "chosen": 1.0}', "["])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    config = short(tmp_path / "run")
    config.data.calibration = str(path)
    with pytest.raises(ValueError, match=r"--data\.calibration .*mcic calibrate"):
        Trainer(config)


def test_a_calibration_counts_under_its_own_rules_alone(tmp_path):
    path = tmp_path / "my_calibration.json"
    path.write_text(json.dumps({"field": "background_power", "chosen": 3.0, "ground_truth_used": False}))
    config = short(tmp_path / "run", data={"calibration": str(path)}).resolved()
    assert apply_calibration(config).method.background_power == 3.0
    stored = short(tmp_path / "run", data={"calibration": str(path)}, method={"background_power": 0.5}).resolved()
    again = short(tmp_path / "run", data={"calibration": str(path)}, method={"cam_threshold": 0.3}).resolved()
    method = apply_calibration(again, stored=stored).method
    assert (method.background_power, method.cam_threshold) == (0.5, 0.3)
    config.method.cam_background = "authors"
    with pytest.raises(
        ValueError, match=r"my_calibration.json chose --method.background-power, .* --method.cam-threshold"
    ):
        apply_calibration(config)
    config.data.saliency = "none"  # then the published background row is the paper's
    assert apply_calibration(config).method.background_power == 3.0


def test_a_calibration_that_a_run_meets_on_its_way_is_remembered(tmp_path):
    groups = {"eval": {"mask_images": 0}}
    Trainer(short(tmp_path / "run", train={"epochs": 1}, **groups)).fit()
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"field": "background_power", "chosen": 0.5, "ground_truth_used": True}))
    for resume in ("auto", str(checkpoints(tmp_path / "run" / "checkpoints")[-1])):
        run = {"resume": resume}
        trainer = Trainer(
            short(tmp_path / "run", train={"epochs": 2}, run=run, data={"calibration": str(path)}, **groups)
        )
        assert trainer.ground_truth_used
        assert trainer.config.method.background_power == 0.5
