"""Pictures of where one network wins over another and where it fails."""

import numpy as np
import pytest
from PIL import Image
from runs import short

from bench import pictures
from bench.pictures import Compared, chosen
from mcic.trainer import Trainer


def image(name, first, second):
    blank = np.zeros((4, 4), np.uint8)
    return Compared(name, np.zeros((4, 4, 3), np.uint8), blank, (blank, blank), (first, second))


def names(found):
    return {kind: [image.id for image in images] for kind, images in found.items()}


def test_the_clearest_of_each_kind_and_none_twice():
    images = [image("a", 90, 10), image("b", 80, 60), image("c", 20, 30), image("d", 5, 50), image("e", 40, 40)]
    assert names(chosen(images, count=1)) == {"win": ["a"], "loss": ["d"], "worst": ["c"]}
    assert names(chosen(images, count=2)) == {"win": ["a", "b"], "loss": ["d", "c"], "worst": ["e"]}


def test_what_is_no_loss_is_not_called_one():
    assert names(chosen([image("a", 90, 10), image("b", 60, 60)], count=2)) == {
        "win": ["a"], "loss": [], "worst": ["b"],
    }  # fmt: skip


def test_the_score_is_the_mean_iou_of_the_classes_shown():
    truth = np.array([[0, 0, 1, 1, 255]], np.uint8)
    assert pictures._score(np.array([[0, 0, 1, 0, 2]], np.uint8), truth, num_classes=3) == pytest.approx(
        100 * (2 / 3 + 1 / 2) / 2
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, context in (("memory", "bank"), ("alone", "none")):
        Trainer(short(root / name, method={"context": context}, train={"epochs": 1})).fit()
    Trainer(short(root / "others", data={"val_images": 3}, train={"epochs": 1})).fit()
    return root


def test_the_command_draws_two_runs(runs, tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    assert pictures.main([str(runs / "memory"), str(runs / "alone"), "--out", str(out), "--count", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out)
    assert 2 <= len(printed) - 1 <= 4  # of four images
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 160


def test_runs_on_other_images_are_not_compared(runs, tmp_path):
    with pytest.raises(ValueError, match="the same validation images"):
        pictures.main([str(runs / "memory"), str(runs / "others"), "--out", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="--count must be 1 or more, got 0"):
        pictures.main([str(runs / "memory"), str(runs / "alone"), "--out", str(tmp_path / "x.png"), "--count", "0"])
