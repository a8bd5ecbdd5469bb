"""Pictures of where one network wins over another and where it fails."""

import numpy as np
import pytest
from PIL import Image
from runs import short

import mcic
from bench import pictures
from bench.pictures import Compared, Comparison, chosen
from mcic.trainer import Trainer


def image(name, first, second):
    return Compared(ord(name), name, (first, second))


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, context in (("memory", "bank"), ("alone", "none")):
        Trainer(short(root / name, method={"context": context}, train={"epochs": 1})).fit()
    Trainer(short(root / "others", data={"val_images": 3}, train={"epochs": 1})).fit()
    return root


def test_scores_are_those_of_the_networks_in_their_order(runs):
    there, back = Comparison(runs / "memory", runs / "alone"), Comparison(runs / "alone", runs / "memory")
    assert [image.scores for image in there.images()] == [image.scores[::-1] for image in back.images()]
    first, truth = there.images()[0], there.data.mask(0)
    mask = mcic.load(runs / "memory").predict(there.data.image(0)).mask
    ious = [100 * ((mask == k) & (truth == k)).sum() / ((mask == k) | (truth == k)).sum() for k in np.unique(truth)]
    assert first.scores[0] == pytest.approx(np.mean(ious))
    assert first.scores[0] != first.scores[1]


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
