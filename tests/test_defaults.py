"""What a configuration leaves to the data and the machine."""

import logging

import numpy as np
import pytest
import torch

from mcic import defaults
from mcic.config import Config, DataConfig, ModelConfig, TrainConfig
from mcic.data.base import Dataset
from mcic.data.palette import voc_palette
from mcic.defaults import SETTLED, fill_unset, settle, step_memory
from mcic.presets import preset

CPU = torch.device("cpu")


class Blank(Dataset):
    """Images of given sizes (height, width)."""

    name = "blank"
    classes = ("a", "b")
    palette = voc_palette(3)

    def __init__(self, *sizes):
        self.sizes = sizes
        self.ids = [str(index) for index in range(len(sizes))]
        self.tags = np.ones((len(sizes), 2), bool)

    def image(self, index):
        return np.zeros((*self.sizes[index], 3), np.uint8)

    def mask(self, index):
        return None


def unset(**train) -> Config:
    """Everything left to the data, on the small backbone (stride 4)."""
    empty = dict.fromkeys(("epochs", "batch_size", "size", "precision"))
    return Config(
        data=DataConfig(long_side=None),
        model=ModelConfig(backbone="tiny", segmentation_head="linear"),
        train=TrainConfig(**(empty | train)),
    ).resolved()


def settled(config: Config) -> list:
    return [getattr(getattr(config, group), field) for group, field in (name.split(".") for name in SETTLED)]


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    monkeypatch.setattr(defaults, "available_memory", lambda device: 2**40)


@pytest.mark.parametrize(
    ("sizes", "long_side", "crop"),
    [
        ([(224, 224)] * 9, 336, 321),
        ([(375, 500)] * 9, 500, 321),
        ([(3000, 4000)] * 9, 512, 321),
        ([(4000, 1000)] * 9, 512, 129),
        ([(100, 224)] * 5 + [(3000, 4000)] * 4, 336, 149),
        ([(3, 3)] * 9, 336, 321),
    ],
)
def test_sizes_follow_the_middle_image(sizes, long_side, crop):
    config = settle(unset(), Blank(*sizes), CPU)
    assert (config.data.long_side, config.train.size) == (long_side, crop)


@pytest.mark.parametrize(("images", "epochs", "batch"), [(5, 60, 1), (20, 46, 4), (300, 12, 8), (1200, 6, 8)])
def test_few_images_are_seen_more_often(images, epochs, batch):
    config = settle(unset(), Blank(*[(97, 97)] * images), CPU)
    assert (config.train.epochs, config.train.batch_size) == (epochs, batch)


def test_the_batch_fits_the_memory(monkeypatch):
    data, config = Blank(*[(97, 97)] * 100), unset(size=97)
    per_image, fixed = step_memory(defaults._skeleton(config, 3), 97)
    for batch in (8, 4, 2, 1):
        monkeypatch.setattr(defaults, "available_memory", lambda device, batch=batch: 2 * (fixed + batch * per_image))
        assert settle(config, data, CPU).train.batch_size == batch
    monkeypatch.setattr(defaults, "available_memory", lambda device: 0)
    assert settle(config, data, CPU).train.batch_size == 1
    assert settle(unset(accumulate=3), data, CPU).train.batch_size == 3


def test_the_memory_is_that_of_the_tensors_kept_for_the_backward_pass():
    """Of one 3×3 convolution and one 1×1 the inputs are kept, and the weights have gradient and momentum."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
                torch.nn.Sigmoid(),
                torch.nn.Conv2d(8, 2, 1, bias=False),
            )

        def forward(self, images):
            return self.layers(images)

    with torch.device("meta"):
        model = Two()
    per_image, fixed = step_memory(model, 10)
    assert per_image == 4 * (3 + 8) * 10 * 10  # the images, and the sigmoid's output, which two layers share
    assert fixed == 3 * 4 * (3 * 8 * 9 + 8 * 2)
    assert step_memory(model, 10, averages=2) == (per_image, 4 * 4 * (3 * 8 * 9 + 8 * 2))


def test_what_is_set_stays_and_the_rest_is_said(caplog):
    data = Blank(*[(97, 97)] * 9)
    config = preset("shapes").resolved()
    with caplog.at_level(logging.INFO):
        assert settle(config, data, CPU) == config
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        config = settle(unset(epochs=3, size=97), data, CPU)
    assert (config.train.epochs, config.train.size) == (3, 97)
    assert "--data.long-side 336, --train.precision fp32, --train.batch-size 2" in caplog.text
    assert "epochs" not in caplog.text


def test_a_run_that_goes_on_keeps_what_was_chosen():
    chosen = settle(unset(), Blank(*[(97, 97)] * 300), CPU)
    again = settle(fill_unset(unset(epochs=20), chosen), Blank(*[(500, 500)] * 9), CPU)
    assert settled(again) == [*settled(chosen)[:-1], 20]
