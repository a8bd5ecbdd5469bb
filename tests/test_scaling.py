"""The counts of `bench.scaling` against cases computed by hand, and the page that shows them."""

import dataclasses
import json

import pytest
import torch

from bench import documents, scaling
from bench.scaling import Setting, costs
from bench.scaling_check import Branch
from mcic.build import build_model
from mcic.presets import preset

SMALL = Setting(ranks=3, images=2, size=17, channels=4, classes=5, slots=8, tags=1, entry=2, element=2, parameters=30)
"""9 feature pixels an image, 6 classes with background, 2 of them an image's own"""


def test_what_ranks_exchange():
    found = costs(SMALL)
    row = 4 * 4 + 12  # four numbers of fp32, a label, an image id
    assert found.gather_received == 2 * 2 * 6 * row  # from two ranks, two images, all classes
    assert found.gather_useful == 2 * 2 * 2 * row
    assert found.gather_memory == 6 * 6 * row
    assert found.gradients_received == 2 * 4 * 30 * 2 // 3
    alone = costs(dataclasses.replace(SMALL, ranks=1))
    assert (alone.gather_received, alone.gradients_received) == (0, 0)


def test_gradients_are_those_of_the_whole_model():
    config = preset("voc12-resnet101").resolved()
    unloaded = dataclasses.replace(config.model, weights="none")
    with torch.device("meta"):
        model = build_model(unloaded, config.method, num_classes=21, backend="reference")
    assert sum(parameter.numel() for parameter in model.parameters()) == Setting().parameters


def test_bank_and_push():
    found = costs(SMALL)
    assert found.bank == 6 * 8 * (4 * 2 + 8) + 8 * 6
    stored = 6 + 6  # every image brings background and one more class
    assert found.push == stored * (4 * (4 + 2) + 16) + 4 * 6 * 6
    assert found.turnover == 6 / 8
    full = costs(dataclasses.replace(SMALL, ranks=100))
    assert full.turnover == 1
    assert full.push == (8 + 5 * 8) * (4 * 6 + 16) + 4 * 200 * 6  # no class keeps more rows than it has slots


def test_the_bank_is_projected_while_it_has_fewer_rows_than_the_batch_pixels():
    setting = dataclasses.replace(SMALL, slots=3)
    assert not setting.projects_pixels  # 18 rows, 18 pixels
    found = costs(setting)
    assert found.projections.operations == (4 + 6) * 2 * 18 * 16
    readable = 2 * 2 * 3
    assert found.attention.operations == 9 * readable * (2 * 8 + 2 * 12)  # scores and message; dv, da and dk
    assert found.read.operations == 4 * 2 * 18 * 16 + 9 * readable * 2 * 8
    assert found.attention_memory == 2 * 9 * readable


def test_with_a_larger_bank_the_pixels_are_projected():
    setting = dataclasses.replace(SMALL, slots=4)
    assert setting.projects_pixels  # 24 rows, 18 pixels
    found = costs(setting)
    assert found.projections.operations == (4 + 7) * 2 * 18 * 16
    assert found.attention.operations == 9 * 16 * (2 * 8 + 2 * 8)  # backward: da, and dz times the keys
    skipped = dataclasses.replace(setting, rows_skipped=True)
    assert skipped.read_classes == 3
    assert not skipped.projects_pixels  # background and a class of each image: 12 rows
    assert costs(skipped).projections.operations == 10 * 2 * 12 * 16


def test_logits_grow_with_classes_and_pixels():
    assert costs(SMALL).logits == 2 * 2 * 2 * 9 * 6
    assert Setting(size=321).grid == 41**2


@pytest.mark.parametrize("slots", [2, 40])
def test_the_counted_bytes_are_those_of_the_tensors(slots):
    """Bank and gathered rows have the size that is counted, and as many rows are stored."""
    setting = dataclasses.replace(SMALL, ranks=1, slots=slots, entry=4)
    branch, found = Branch(setting), costs(setting)
    assert sum(buffer.nbytes for buffer in branch.bank.buffers()) == found.bank
    assert sum(part.nbytes for part in branch.rows) == found.gather_memory
    branch.bank.ids.fill_(-1)
    branch.push()()
    assert int((branch.bank.ids >= 0).sum()) == int(sum(min(slots, int(count)) for count in branch.own.sum(0)))
    branch.read()


def test_the_page_shows_what_is_computed():
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.tables() in page
    assert scaling.measured(json.loads(scaling.RESULT.read_text(encoding="utf-8"))) in page


def test_writing_the_page_keeps_the_text_around(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{documents.BEGIN}\nold\n{documents.END}\n\nafter\n")
    monkeypatch.setattr(scaling, "PAGE", page)
    scaling.write_page(tmp_path / "none.json")
    assert page.read_text().startswith("# Title\n")
    assert page.read_text().endswith("\n\nafter\n")
    assert "old" not in page.read_text()
