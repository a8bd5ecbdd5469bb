"""Order, shares and determinism of the loaders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import scene

from mcic.data import EvalItem, GroundTruth, SavedMasks, TrainLoader, default_workers, eval_items
from mcic.data.base import Dataset
from mcic.data.palette import voc_palette
from mcic.stop import StopRequest


class Scenes(Dataset):
    """Images in memory, of several sizes; image `broken` cannot be read, and every third has no mask."""

    name = "scenes"
    classes = ("a", "b", "c")
    palette = voc_palette(4)

    def __init__(self, count, broken=-1):
        self.ids = [f"scene_{index}" for index in range(count)]
        self.broken = broken
        labels = [[1 + i % 3] for i in range(count)]
        self.scenes = [scene(i, labels[i], size=(40 + i, 50)) for i in range(count)]
        self.tags = np.eye(3, dtype=bool)[np.arange(count) % 3]

    def image(self, index):
        if index == self.broken:
            raise ValueError("cannot read the image scene.jpg")
        return self.scenes[index][0]

    def mask(self, index):
        return None if index % 3 == 2 else self.scenes[index][1]


def brightness(dataset, index, image):
    return (image.max(2) / 255).astype(np.float32)


def loader(count=11, *, dataset=None, saliency=brightness, **changes):
    arguments = {"size": 32, "scale": (0.5, 1.5), "flip": True, "color_jitter": 0.2, "batch_size": 4, "seed": 0,
                 "workers": 0, "targets": GroundTruth()} | changes  # fmt: skip
    return TrainLoader(dataset or Scenes(count), saliency, **arguments)


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in a.__slots__]
    return all(one is two if one is None or two is None else torch.equal(one, two) for one, two in pairs)


def test_batches_have_the_promised_shapes():
    (first, _), data = loader().epoch(0), Scenes(11)
    assert first.images.shape == (4, 3, 32, 32)
    assert first.images.dtype == torch.float32
    assert first.saliency.shape == first.masks.shape == first.valid.shape == (4, 32, 32)
    assert (first.masks.dtype, first.valid.dtype, first.indices.dtype) == (torch.uint8, torch.bool, torch.int64)
    assert torch.equal(first.tags, torch.from_numpy(data.tags[first.indices]))
    unmasked = first.indices % 3 == 2
    assert ((first.masks == 255).all(2).all(1) >= unmasked).all()
    assert (first.masks[~unmasked] < 255).any()


def test_an_epoch_shows_every_image_once_and_drops_the_rest():
    train = loader()
    assert train.steps == 2
    for epoch in range(3):
        indices = torch.cat([batch.indices for batch in train.epoch(epoch)]).tolist()
        assert len(indices) == len(set(indices)) == 8
        assert indices != sorted(indices)
    orders = {tuple(torch.cat([batch.indices for batch in train.epoch(e)]).tolist()) for e in (0, 1, 2, 0)}
    assert len(orders) == 3


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_workers_do_not_hear_what_asks_the_run_to_stop(number):
    """torchrun, systemd and a terminal signal all processes of a run, which needs the batches of the step it is in."""
    train = loader(workers=1)
    batches = train.epoch(0)
    first = next(batches)
    for worker in train._batches._iterator._workers:
        os.kill(worker.pid, number)
    assert all(same(*pair) for pair in zip([first, *batches], loader().epoch(0), strict=True))


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("raise RuntimeError", 1), ("sys.exit(7)", 7)])
def test_a_program_that_ends_within_an_epoch_takes_its_workers_along(end, status):
    """multiprocessing would wait for ever for workers that do not hear its SIGTERM."""
    code = f"import sys, test_data_loader as t; batches = t.loader(workers=1).epoch(0); next(batches); {end}"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=100)
    assert done.returncode == status
    assert "worker" not in done.stderr


def test_the_number_of_workers_changes_nothing():
    here, there = loader(), loader(workers=2)
    for epoch in (0, 1):
        batches = list(zip(here.epoch(epoch), there.epoch(epoch), strict=True))
        assert len(batches) == 2
        assert all(same(a, b) for a, b in batches)


def test_a_run_that_stopped_within_an_epoch_leaves_no_trace():
    train = loader(workers=1)
    next(iter(train.epoch(0)))
    assert all(same(a, b) for a, b in zip(loader().epoch(1), train.epoch(1), strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_tile_the_global_batch(world_size):
    ranks = [list(loader(rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)]
    for step, whole in enumerate(loader().epoch(1)):
        for name in set(whole.__slots__) - {"confidence"}:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(batches[step], name) for batches in ranks]))


def test_the_ranks_share_each_micro_batch():
    """In a rank's batch too they follow each other: of two, its first half and its second."""
    ranks = [next(loader(rank=rank, world_size=2, accumulate=2).epoch(0)).indices.chunk(2) for rank in range(2)]
    whole = next(loader().epoch(0)).indices.chunk(2)
    for part, micro_batch in enumerate(whole):
        assert torch.equal(torch.cat([parts[part] for parts in ranks]), micro_batch)


def test_start_skips_without_reading():
    data = Scenes(12)
    *_, last = loader(dataset=data).epoch(0)
    read = []
    data.image = lambda index: read.append(index) or data.scenes[index][0]
    (resumed,) = loader(dataset=data).epoch(0, start=2)
    assert same(last, resumed)
    assert sorted(read) == sorted(resumed.indices.tolist())
    assert list(loader(dataset=data).epoch(0, start=3)) == []
    with pytest.raises(ValueError, match="3 steps"):
        next(loader(dataset=data).epoch(0, start=4))


def test_without_saliency():
    train = TrainLoader(
        Scenes(4), None, size=16, scale=(1, 1), flip=False, color_jitter=0, batch_size=2, seed=0, workers=0
    )
    assert next(train.epoch(0)).saliency is None
    assert next(eval_items(Scenes(4), None)).saliency is None


def test_too_few_images_and_uneven_batches_say_what_to_do():
    with pytest.raises(ValueError, match=r"scenes has 3 training images.*--train.batch-size"):
        loader(3)
    with pytest.raises(ValueError, match=r"multiple of accumulation steps times processes, 1 × 3, got 4"):
        loader(world_size=3)
    with pytest.raises(ValueError, match=r"2 × 4, got 4"):
        loader(world_size=4, accumulate=2)
    with pytest.raises(ValueError, match=r"--train.seed must be 0 or more"):
        loader(seed=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_plain_sentence(workers):
    broken = Scenes(8, broken=5)
    with pytest.raises(ValueError, match=r"^image scene_5 \(scenes\): cannot read the image scene.jpg$"):
        list(loader(dataset=broken, workers=workers).epoch(0))
    with pytest.raises(ValueError, match=r"^image scene_5 \(scenes\): cannot read the image scene.jpg$"):
        list(eval_items(broken, None, workers=workers))


def test_masks_that_do_not_belong_to_the_image_are_refused():
    data = Scenes(4)
    data.scenes[1] = (data.scenes[1][0], np.zeros((5, 6), np.uint8))
    with pytest.raises(ValueError, match=r"scene_1 .*6×5 pixels, its image 50×41"):
        list(eval_items(data, None))
    data = Scenes(4)
    data.scenes[1][1][0, 0] = 4
    with pytest.raises(ValueError, match=r"scene_1 .*value 4: expected 0…3"):
        list(eval_items(data, None))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_items_are_whole_and_in_order(workers):
    data = Scenes(6)
    items = list(eval_items(data, brightness, indices=[4, 1, 5], workers=workers))
    assert [item.index for item in items] == [4, 1, 5]
    for item in items:
        assert isinstance(item, EvalItem)
        image, mask = data.scenes[item.index]
        np.testing.assert_array_equal(item.pixels, image)
        assert item.image.shape == (3, *image.shape[:2])
        assert item.saliency.shape == image.shape[:2]
        assert torch.equal(item.tags, torch.from_numpy(data.tags[item.index]))
        assert item.mask is None if item.index == 5 else np.array_equal(item.mask, mask)
    assert [item.index for item in eval_items(data, None)] == list(range(6))


def test_default_workers(tmp_path):
    data = Scenes(2)
    assert default_workers(None, data) == 0
    assert default_workers(3, data) == 3
    data.path = lambda index: tmp_path
    assert 0 <= default_workers(None, data) <= 8


def test_where_tags_supervise_no_mask_is_read():
    data = Scenes(8)
    data.mask = None
    (first, _) = loader(dataset=data, targets=None).epoch(0)
    assert first.masks is None
    assert first.confidence is None


@pytest.fixture
def saved(tmp_path):
    """Masks as `mcic masks` leaves them: label 1 left of the middle, 255 right of it, confidence grows with the row."""
    for part in ("labels", "confidence"):
        (tmp_path / part).mkdir()
    for index, name in enumerate(Scenes(6).ids):
        height, width = 40 + index, 50
        labels = np.where(np.arange(width) < 25, 1, 255).astype(np.uint8)
        Image.fromarray(np.tile(labels, (height, 1))).save(tmp_path / "labels" / f"{name}.png")
        rows = np.linspace(0, 255, height).round().astype(np.uint8)
        Image.fromarray(np.tile(rows[:, None], (1, width))).save(tmp_path / "confidence" / f"{name}.png")
    (tmp_path / "masks.json").write_text(json.dumps({"classes": ["background", "a", "b", "c"]}))
    return tmp_path


class TestSavedMasks:
    def test_labels_and_confidence_go_through_the_same_crop(self, saved):
        targets = SavedMasks(saved, Scenes(6))
        changes = {"size": 64, "scale": (1, 1), "flip": False, "color_jitter": 0}
        (batch,) = loader(6, targets=targets, **changes).epoch(0)
        for labels, confidence, valid, index in zip(
            batch.masks, batch.confidence, batch.valid, batch.indices.tolist(), strict=True
        ):
            height = 40 + index
            inside = labels[valid].view(height, 50)
            assert (inside[:, :25] == 1).all()
            assert (inside[:, 25:] == 255).all()
            expected = torch.linspace(0, 255, height).round()[:, None].expand(height, 50) / 255
            assert torch.allclose(confidence[valid].view(height, 50), expected, atol=1e-6)
            assert (labels[~valid] == 255).all()
            assert (confidence[~valid] == 0).all()

    def test_unfinished_masks_are_refused(self, saved):
        (saved / "masks.json").unlink()
        with pytest.raises(ValueError, match=r"no finished masks.*mcic masks"):
            SavedMasks(saved, Scenes(6))

    def test_masks_of_other_classes_are_refused(self, saved):
        fewer = Scenes(6)
        fewer.classes = ("a", "b")
        with pytest.raises(ValueError, match="of the classes a, b, c, the data of a, b"):
            SavedMasks(saved, fewer)

    @pytest.mark.parametrize("part", ["labels", "confidence"])
    def test_a_missing_mask_is_named_before_training(self, saved, part):
        (saved / part / "scene_3.png").unlink()
        with pytest.raises(ValueError, match=rf"{part}/scene_3\.png is missing"):
            SavedMasks(saved, Scenes(6))

    @pytest.mark.parametrize("content", ["{}", "[", '{"classes": []}', "[]"])
    def test_a_damaged_manifest_is_named(self, saved, content):
        (saved / "masks.json").write_text(content)
        with pytest.raises(ValueError, match=r"masks\.json is not what mcic masks wrote"):
            SavedMasks(saved, Scenes(6))

    def test_masks_of_another_split_are_refused(self, saved):
        manifest = json.loads((saved / "masks.json").read_text())
        (saved / "masks.json").write_text(json.dumps(manifest | {"settings": {"split": "val"}}))
        with pytest.raises(ValueError, match="of the images of val, not of those of train"):
            SavedMasks(saved, Scenes(6))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_confidence_that_does_not_fit_is_named(self, saved, workers):
        Image.new("L", (99, 99)).save(saved / "confidence" / "scene_3.png")
        targets = SavedMasks(saved, Scenes(6))
        with pytest.raises(ValueError, match="confidence of image scene_3 is 99×99 pixels, its image 50×43"):
            list(loader(6, targets=targets, batch_size=6, workers=workers).epoch(0))
        (saved / "confidence" / "scene_3.png").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"scene_3\.png"):
            list(loader(6, targets=targets, batch_size=6, workers=workers).epoch(0))


@pytest.mark.parametrize("long_side", [25, 75])
def test_images_are_brought_to_one_size_with_all_that_belongs_to_them(long_side):
    data = Scenes(6)
    data.long_side = long_side
    items = list(eval_items(data, brightness))
    assert [item.full_size for item in items] == [(40 + index, 50) for index in range(6)]
    for index, item in enumerate(items):
        height = round((40 + index) * long_side / 50)
        assert item.image.shape == (3, height, long_side)
        assert item.saliency.shape == (height, long_side)
        assert item.mask is None or item.mask.shape == (height, long_side)
        image, mask = data.image(index), data.mask(index)
        assert (item.pixels == Image.fromarray(image).resize((long_side, height), Image.Resampling.BILINEAR)).all()
        if mask is not None:
            assert (item.mask.numpy() == Image.fromarray(mask).resize((long_side, height), 0)).all()


def test_images_stay_as_they_are_where_no_side_is_set():
    assert all(item.image.shape[1:] == item.full_size for item in eval_items(Scenes(6), None))
