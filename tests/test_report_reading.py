"""What the report says that a pixel read is what the attention read: against the weights over the whole bank."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import short

from mcic import panels
from mcic.build import build_model
from mcic.config import MethodConfig, ModelConfig
from mcic.data.loader import eval_items
from mcic.data.shapes import Shapes
from mcic.evaluate import at_pixels
from mcic.model import Contexts
from mcic.objective import Objective, push
from mcic.panels import draw_examples
from mcic.pseudo import with_background
from mcic.report import write_report
from mcic.trainer import Trainer

IMAGES = 30


@pytest.fixture(scope="module")
def dataset():
    return Shapes("train", count=IMAGES)


def make(rows, **fields):
    """A model with `rows` random contexts in its bank, of the classes in turn; several of an image, one of no image."""
    torch.manual_seed(0)
    method = MethodConfig(slots=8, **fields).resolved()
    model = build_model(ModelConfig(), method, num_classes=len(Shapes.classes) + 1, backend="auto")
    if model.memory is not None and rows:
        labels = torch.arange(rows, dtype=torch.int32) % 7
        ids = torch.arange(rows) * 3 % IMAGES // 7 * 7
        ids[5], ids[6] = -1, IMAGES  # unknown, and none of this data set's
        push(model, Contexts(torch.randn(rows, model.memory.entries.shape[-1]) * 4, labels, ids))
    return model, Objective(method)


def draw(folder, model, objective, dataset):
    draw_examples(folder, model, objective, dataset, None, device=torch.device("cpu"))
    final = folder / "previews" / "final"
    index = json.loads((final / "index.json").read_text())
    readings = final / "readings.json"
    return index, json.loads(readings.read_text()) if readings.exists() else None


@torch.no_grad()
def expected(model, dataset, item):
    """[h, w] of {(class name, image): weight}, from the attention over every slot of every class."""
    model.eval()
    outputs, tags = at_pixels(model, item.image[None], item.tags[None]), item.tags[None]
    memory = model.memory
    weights = model.propagation.weights(
        outputs.prediction.features, memory.entries, memory.counts, with_background(tags)
    )[0].unflatten(0, outputs.prediction.features.shape[-2:])  # [h, w, K, S]
    names, read = ("background", *dataset.classes), np.empty(weights.shape[:2], dtype=object)
    for y, x in np.ndindex(read.shape):
        read[y, x] = {}
        for label, slot in np.argwhere(weights[y, x].numpy() > 0).tolist():
            image = memory.ids[label, slot].item()
            key = (names[label], dataset.ids[image] if 0 <= image < IMAGES else None)
            read[y, x][key] = read[y, x].get(key, 0) + weights[y, x, label, slot].item()
    return read


@pytest.mark.parametrize("fields", [{}, {"heads": 4, "attention_threshold": 0.9}])
def test_cells_hold_the_largest_weights(tmp_path, dataset, fields, monkeypatch):
    monkeypatch.setattr(panels, "_CHUNK", 1000)  # the pixels come in many parts
    model, objective = make(40, **fields)
    index, stored = draw(tmp_path, model, objective, dataset)
    assert len(index) == len(stored["readings"]) == panels.NUM_EXAMPLES
    assert [entry["id"] for entry in index[:2]] == ["train_00000", "train_00001"]
    assert index[-1]["id"] == f"train_{IMAGES - 1:05d}"
    for place in (0, 11):
        number = dataset.ids.index(index[place]["id"])
        read = expected(model, dataset, next(eval_items(dataset, None, indices=[number])))
        reading = stored["readings"][place]
        assert (reading["rows"], reading["columns"]) == read.shape == (25, 25)  # 97 pixels, stride 4
        shape = (25, 25, 5)
        sources, weights = (np.reshape(reading[name], shape) for name in ("sources", "weights"))
        for y, x in np.ndindex(25, 25):
            largest = sorted(read[y, x].values(), reverse=True)[:5]
            assert weights[y, x, : len(largest)] == pytest.approx(np.array(largest) * 10_000, abs=1)
            for source, weight in zip(sources[y, x].tolist(), weights[y, x].tolist(), strict=True):
                entry = stored["sources"][source]
                key = (entry["class"], entry["image"])
                assert weight == pytest.approx(read[y, x].get(key, 0) * 10_000, abs=1)


def test_sources_count_their_contexts_and_have_thumbnails(tmp_path, dataset):
    model, objective = make(40)
    _, stored = draw(tmp_path, model, objective, dataset)
    for source in stored["sources"]:
        label = ("background", *dataset.classes).index(source["class"])
        ids = model.memory.ids[label, : model.memory.counts[label]]
        known = (ids >= 0) & (ids < IMAGES)
        same = known & (ids == dataset.ids.index(source["image"])) if source["image"] else ~known
        assert source["contexts"] == same.sum()
    for name, file in stored["thumbnails"].items():
        pixels = np.asarray(Image.open(tmp_path / "previews" / "final" / file))
        assert max(pixels.shape[:2]) == 96
        small = Image.fromarray(dataset.image(dataset.ids.index(name)))
        small.thumbnail((96, 96))
        np.testing.assert_array_equal(pixels, np.asarray(small))
    assert set(stored["thumbnails"]) == {source["image"] for source in stored["sources"]} - {None}


def test_coarse_grids_name_the_nearest_feature():
    """A photograph of 203×61 pixels at stride 4: 51 features in a row become 25 cells, 16 rows stay 16."""
    features = torch.arange(17 * 52).view(17, 52, 1)  # the padding adds a row and a column
    read = panels._Read(torch.zeros(1), torch.ones(17, 52, 1), features)
    cells = panels._cells(read, 4, (61, 203)).sources[..., 0]
    assert cells.shape == (16, 25)
    centers = (np.arange(25) + 0.5) * 203 / 25
    assert np.abs(cells[0] * 4 - centers).max() <= 2
    np.testing.assert_array_equal(cells[:, 0] // 52, np.arange(16))


@pytest.mark.parametrize(("rows", "fields"), [(0, {}), (0, {"context": "self"}), (0, {"context": "none"})])
def test_without_anything_to_read_there_is_no_reading(tmp_path, dataset, rows, fields):
    model, objective = make(rows, **fields)
    index, stored = draw(tmp_path, model, objective, dataset)
    assert stored is None
    assert len(index) == panels.NUM_EXAMPLES
    (tmp_path / "config.yaml").write_text("preset: shapes\n")
    (tmp_path / "summary.json").write_text("{}")
    assert 'class="reading"' not in write_report(tmp_path).read_text()


def test_uncertainty_is_the_mean_lack_of_confidence(tmp_path, dataset):
    model, objective = make(0, context="none")
    index, _ = draw(tmp_path, model, objective, dataset)
    item = next(eval_items(dataset, None, indices=[0]))
    with torch.no_grad():
        scores = at_pixels(model.eval(), item.image[None], item.tags[None]).prediction.logits.softmax(1)
    assert index[0]["uncertainty"] == pytest.approx(100 - 100 * scores.amax(1).mean().item(), abs=1e-3)


def test_a_finished_run_names_images_that_have_the_class(tmp_path):
    """The masks are measured on some of the images only; the bank's ids are places among all of them."""
    groups = {"method": {"pool_threshold": 0.2}, "train": {"epochs": 1}, "run": {"previews": 1}}
    trainer = Trainer(short(tmp_path / "run", **groups, eval={"mask_images": 4}))
    trainer.fit()
    final = tmp_path / "run" / "previews" / "final"
    stored = json.loads((final / "readings.json").read_text())
    assert len(stored["readings"]) == len(trainer.data.train) == 16
    objects = [source for source in stored["sources"] if source["class"] != "background"]
    assert objects
    for source in objects:
        tags = trainer.data.train.tags[trainer.data.train.ids.index(source["image"])]
        assert tags[Shapes.classes.index(source["class"])]
