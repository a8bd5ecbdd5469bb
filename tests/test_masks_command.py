"""`mcic masks`: what it writes, that it continues, that ranks share it, and what it refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import short
from trees import make_class_folders, make_folder, save_mask

from mcic import masks as masks_module
from mcic.cli import run as run_command
from mcic.cli.masks import main
from mcic.coco_json import coco_instances, encode_rle
from mcic.data.folder import Folder
from mcic.data.images import read_mask
from mcic.data.targets import SavedMasks
from mcic.inference import dense_protocol
from mcic.maskfiles import claim_folder, write_json
from mcic.masks import UNSURE, MaskSettings, decide, soft_masks, write_masks
from mcic.preview import overlay
from mcic.pseudo import with_background
from mcic.restore import restore_run
from mcic.runfolder import read_document
from mcic.segmentation import save_image
from mcic.trainer import Trainer

FAST = MaskSettings(scales=(1.0,), flip=False, refine="none", unsure=0.5)


def make_run(folder, root=None, **groups):
    root = root or make_folder(folder.parent / f"{folder.name}-data")
    changes = {
        "data": {"root": str(root), "train_images": None, "val_images": None, "saliency": "none"},
        "train": {"size": 33, "epochs": 2}, "model": {"backbone": "tiny", "weights": "none"},
        "method": {"pool_threshold": 0.2}, "eval": {"mask_images": 0},
    }  # fmt: skip
    for group, fields in groups.items():
        changes[group] = changes.get(group, {}) | fields
    Trainer(short(folder, "folder", **changes)).fit()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on eight photographs of 56×40 pixels with three classes."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run without a bank, whose images were read at 32 pixels."""
    groups = {"method": {"context": "none"}, "data": {"long_side": 32}}
    return make_run(tmp_path_factory.mktemp("runs") / "plain", **groups)


@pytest.fixture(scope="module")
def enlarged_run(tmp_path_factory):
    """The same, read at 80 pixels instead of 56."""
    groups = {"method": {"context": "none"}, "data": {"long_side": 80}}
    return make_run(tmp_path_factory.mktemp("runs") / "enlarged", **groups)


@pytest.fixture(scope="module")
def restored(run):
    return restore_run(run, device="cpu")


def pixels(folder):
    """Relative path → array of every PNG below `folder`."""
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def assert_same_masks(first, second):
    assert first.keys() == second.keys()
    assert first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_folder_of_masks(run, restored, tmp_path):
    dataset = restored.data.train
    manifest = write_masks(run, MaskSettings(), out=tmp_path / "masks")
    assert manifest == json.loads((tmp_path / "masks" / "masks.json").read_text()) | {"settings": manifest["settings"]}
    assert manifest["classes"] == ["background", "ant", "cat", "dog"]
    assert manifest["count"] == 8
    assert manifest["ground_truth_used"] is False
    assert manifest["settings"]["source"] == "merged"
    assert manifest["settings"]["unsure"] == UNSURE["crf"]
    assert 0 < manifest["measured"]["mask_miou"] <= 100
    files = pixels(tmp_path / "masks")
    assert set(files) == {f"{part}/{name}.png" for part in ("labels", "confidence") for name in dataset.ids}
    for index, name in enumerate(dataset.ids):
        label, confidence = files[f"labels/{name}.png"], files[f"confidence/{name}.png"]
        assert label.dtype == confidence.dtype == np.uint8
        assert label.shape == confidence.shape == dataset.image(index).shape[:2]
        own = {0, 255, *(np.flatnonzero(dataset.tags[index]) + 1).tolist()}
        assert set(np.unique(label).tolist()) <= own
        assert (label[confidence < 255 * UNSURE["crf"] - 0.5] == 255).all()
        assert (label[confidence > 255 * UNSURE["crf"] + 0.5] != 255).all()
        with Image.open(tmp_path / "masks" / "labels" / f"{name}.png") as image:
            assert image.mode == "P"
            palette = np.array(image.getpalette()).reshape(-1, 3)
        np.testing.assert_array_equal(palette[:4], dataset.palette)
    assert not list((tmp_path / "masks").rglob("*.partial"))


def test_the_second_stage_reads_them(run, restored, tmp_path):
    write_masks(run, FAST, out=tmp_path / "masks")
    dataset, files = restored.data.train, pixels(tmp_path / "masks")
    label, confidence = SavedMasks(tmp_path / "masks", dataset)(dataset, 3)
    np.testing.assert_array_equal(label, files[f"labels/{dataset.ids[3]}.png"])
    np.testing.assert_allclose(confidence * 255, files[f"confidence/{dataset.ids[3]}.png"], atol=1e-3)


def test_masks_of_val_go_where_they_are_asked(run, restored, tmp_path):
    manifest = write_masks(run, dataclasses.replace(FAST, split="val"), out=tmp_path / "a" / "b")
    assert manifest["count"] == 4
    assert set(pixels(tmp_path / "a/b")) >= {f"labels/{name}.png" for name in restored.data.val.ids}


@pytest.mark.parametrize("source", ["network", "context", "cam", "merged"])
def test_soft_masks_are_probabilities_of_own_classes(restored, source):
    images, tags = torch.randn(2, 3, 40, 56), torch.tensor([[True, False, True], [False, False, False]])
    method = restored.config.method
    saliency = torch.rand(2, 40, 56)
    saliency[:, :9] = 1  # nothing of background, and perhaps nothing of a class
    soft = soft_masks(restored.model, method, images, tags, saliency, source=source, scales=(0.75, 1.0), flip=True)
    assert soft.shape == (2, 4, 40, 56)
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 40, 56))
    assert soft[:, :][~with_background(tags)].abs().max() == 0
    assert soft[0, [0, 1, 3]].amax((1, 2)).min() > 0


def test_soft_masks_follow_the_protocol(restored):
    """Scales and mirror as in evaluation; merged is the mean of what the CAM and the bank say."""
    images, tags = torch.randn(1, 3, 40, 56), torch.tensor([[True, False, True]])
    model, method = restored.model, restored.config.method
    own = with_background(tags)[:, :, None, None]

    def soft(source, **settings):
        return soft_masks(model, method, images, tags, None, source=source, **settings)

    with torch.no_grad():
        logits = dense_protocol(model.network, images, model.network.stride, "voc")
    expected = (logits.exp() * own) / (logits.exp() * own).sum(1, keepdim=True)
    torch.testing.assert_close(soft("network", scales=(0.75, 1.0, 1.25), flip=True), expected)
    torch.testing.assert_close(soft("merged"), (soft("cam") + soft("context")) / 2)
    assert not torch.allclose(soft("context"), soft("network"), atol=1e-4)


def test_unsure_pixels_are_ignored_and_keep_their_confidence():
    probabilities = torch.tensor([[0.7, 0.2, 0.5], [0.3, 0.8, 0.5]])[None, :, None]  # [1, 2, 1, 3]
    label, confidence = decide(probabilities, unsure=0.75)
    assert label.tolist() == [[[255, 1, 255]]]
    assert confidence.tolist() == [[[round(255 * 0.7), round(255 * 0.8), 128]]]
    assert decide(probabilities, unsure=0.5)[0].tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("which", ["plain_run", "enlarged_run"])
def test_masks_have_the_full_size_of_their_images(which, tmp_path, request):
    run = request.getfixturevalue(which)
    manifest = write_masks(run, MaskSettings(scales=(1.0,), refine="pamr"), out=tmp_path / "masks")
    assert manifest["settings"]["source"] == "network"
    assert all(mask.shape == (40, 56) for mask in pixels(tmp_path / "masks").values())
    assert manifest["measured"]["mask_miou"] is not None


def test_an_interrupted_command_continues(run, tmp_path, monkeypatch):
    write_masks(run, FAST, out=tmp_path / "whole")
    calls = []

    def stops(probabilities, images, *, method):
        calls.append(method)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return probabilities

    with monkeypatch.context() as patch:
        patch.setattr(masks_module, "refine", stops)
        with pytest.raises(KeyboardInterrupt):
            write_masks(run, FAST, out=tmp_path / "part")
    assert len(pixels(tmp_path / "part")) == 6
    assert not (tmp_path / "part" / "masks.json").exists()
    (tmp_path / "part" / "labels" / ".x.png.7.partial").write_bytes(b"half a file")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").rglob("*.png")}
    write_masks(run, FAST, out=tmp_path / "part")
    assert_same_masks(pixels(tmp_path / "part"), pixels(tmp_path / "whole"))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (tmp_path / "part" / "masks.json").is_file()
    assert not list((tmp_path / "part").rglob("*.partial"))


def test_a_file_is_whole_or_not_there(run, tmp_path, monkeypatch):
    """A disk that is full in the middle of an image leaves no file under the image's name."""

    def fails(self, path, format):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fails)
        with pytest.raises(OSError, match="No space left"):
            write_masks(run, FAST, out=tmp_path / "masks")
    assert not pixels(tmp_path / "masks")
    write_masks(run, FAST, out=tmp_path / "masks")
    assert len(pixels(tmp_path / "masks")) == 16


def command(*words):
    return run_command("mcic", main, [str(word) for word in words])


QUICK = ("--scales", "1", "--no-flip", "--refine", "none", "--unsure", "0.5")


def test_other_settings_are_not_mixed(run, tmp_path, capsys):
    out = tmp_path / "masks"
    assert command(run, "--out", out, *QUICK) == 0
    assert "mIoU" in capsys.readouterr().out
    before = pixels(out)
    assert command(run, "--out", out, *QUICK[:-1], "0.9") == 2
    said = capsys.readouterr().err
    assert "holds masks of other settings (unsure 0.5, now 0.9)" in said
    assert len(said.splitlines()) == 1
    assert_same_masks(before, pixels(out))
    assert command(run, "--out", out, *QUICK[:-1], "0.9", "--overwrite") == 0
    after = pixels(out)
    assert sum((after[name] == 255).sum() for name in after if "labels" in name) > sum(
        (before[name] == 255).sum() for name in before if "labels" in name
    )


def test_files_of_others_are_left_alone(run, tmp_path, capsys):
    out = tmp_path / "mine"
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "train_0.png").write_bytes(b"drawn by hand")
    (out / "settings.json").write_text("[]")
    for more in ((), ("--overwrite",)):
        assert command(run, "--out", out, *QUICK, *more) == 2
        assert "holds other files than masks" in capsys.readouterr().err
    assert {path.name for path in out.rglob("*")} == {"labels", "train_0.png", "settings.json"}
    assert (out / "labels" / "train_0.png").read_bytes() == b"drawn by hand"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scales", "0.0001"), "--scales must be one or more numbers between 0.1 and 10"),
        (("--scales", "1", "11"), "--scales must be one or more numbers between 0.1 and 10"),
        (("--unsure", "1.5"), "--unsure must be between 0 and 1, got 1.5"),
        (("--source", "context"), "needs a run with a bank"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--refine", "parm"), "refine"),
    ],
)
def test_what_cannot_work_is_refused(plain_run, tmp_path, capsys, words, message):
    assert command(plain_run, "--out", tmp_path / "masks", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "masks").exists()


def test_no_run_folder(tmp_path, capsys):
    assert command(tmp_path / "nothing") == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:__array__")  # of pycocotools
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_are_those_of_coco(height, width, draw):
    coco = pytest.importorskip("pycocotools.mask")
    bits = draw.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    region = encode_rle(mask)
    assert sum(region["counts"]) == mask.size
    np.testing.assert_array_equal(coco.decode(coco.frPyObjects(region, height, width)), mask)


@pytest.mark.filterwarnings("ignore:__array__")  # of pycocotools
def test_coco_json(run, restored, tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    write_masks(run, FAST, out=tmp_path / "masks", coco=True)
    coco, dataset = COCO(str(tmp_path / "masks" / "coco.json")), restored.data.train
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(dataset.classes)
    for index, name in enumerate(dataset.ids):
        label = np.asarray(Image.open(tmp_path / "masks" / "labels" / f"{name}.png"))
        (image,) = coco.loadImgs([index + 1])
        assert image["file_name"] == f"train/images/{dataset.path(index).name}"
        drawn = np.zeros_like(label)
        for region in coco.loadAnns(coco.getAnnIds(imgIds=[index + 1])):
            part = coco.annToMask(region).astype(bool)
            drawn[part] = region["category_id"]
            left, top, width, height = region["bbox"]
            assert part.sum() == region["area"] == part[top : top + height, left : left + width].sum()
        np.testing.assert_array_equal(drawn, np.where(label == 255, 0, label))


def test_two_ranks_make_what_one_makes(run, tmp_path):
    code = "import sys; from mcic.cli import run, masks; sys.exit(run('mcic', masks.main, sys.argv[1:]))"
    words = [str(run), "--out", str(tmp_path / "two"), *QUICK, "--coco"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([*launcher, sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("mIoU") == 1
    one = write_masks(run, FAST, out=tmp_path / "one", coco=True)
    two = json.loads((tmp_path / "two" / "masks.json").read_text())
    assert two["measured"] == pytest.approx(one["measured"])
    assert_same_masks(pixels(tmp_path / "two"), pixels(tmp_path / "one"))
    assert (tmp_path / "two" / "coco.json").read_text() == (tmp_path / "one" / "coco.json").read_text()


def test_ground_truth_is_admitted(run, tmp_path, monkeypatch):
    uses = dataclasses.replace(restore_run(run, device="cpu"), ground_truth_used=True)
    monkeypatch.setattr(masks_module, "restore_run", lambda folder, **_: uses)
    assert write_masks(run, FAST, out=tmp_path / "masks")["ground_truth_used"] is True
    assert json.loads((tmp_path / "masks" / "masks.json").read_text())["ground_truth_used"] is True


def copy_of_run(run, folder):
    """The run and its data copied below `folder`."""
    copy, root = folder / "run", folder / "data"
    shutil.copytree(run, copy)
    shutil.copytree(run.parent / f"{run.name}-data", root)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(run.parent / f"{run.name}-data"), str(root)))
    return copy, root


def test_masks_of_other_weights_are_not_taken_over(run, tmp_path, capsys):
    other, out = make_run(tmp_path / "other", train={"seed": 7}), tmp_path / "masks"
    assert command(run, "--out", out, *QUICK) == 0
    before = pixels(out)
    capsys.readouterr()
    assert command(other, "--out", out, *QUICK) == 2
    said = capsys.readouterr().err
    assert "holds masks of other weights: choose another --out, or --overwrite" in said
    assert len(said.splitlines()) == 1
    assert_same_masks(before, pixels(out))
    assert json.loads((out / "masks.json").read_text())["run"] == str(run)
    assert command(other, "--out", out, *QUICK, "--overwrite") == 0
    write_masks(other, FAST, out=tmp_path / "anew")
    assert_same_masks(pixels(out), pixels(tmp_path / "anew"))


def test_corrected_tags_ask_for_new_masks(run, tmp_path, capsys):
    copy, root = copy_of_run(run, tmp_path)
    assert command(copy, *QUICK) == 0
    assert command(copy, *QUICK) == 0  # nothing has changed
    table = root / "train" / "tags.csv"
    assert "train_0.jpg,cat" in table.read_text()
    table.write_text(table.read_text().replace("train_0.jpg,cat", "train_0.jpg,dog"))
    capsys.readouterr()
    assert command(copy, *QUICK) == 2
    assert "holds masks of other images, classes or tags" in capsys.readouterr().err
    assert command(copy, *QUICK, "--overwrite") == 0
    assert 2 not in np.unique(pixels(copy / "masks")["labels/train_0.png"])


def test_a_replaced_photograph_asks_for_new_masks(run, tmp_path, capsys):
    copy, root = copy_of_run(run, tmp_path)
    assert command(copy, *QUICK) == 0
    shutil.copy(root / "train" / "images" / "train_1.jpg", root / "train" / "images" / "train_0.jpg")
    capsys.readouterr()
    assert command(copy, *QUICK) == 2
    assert "holds masks of other images, classes or tags" in capsys.readouterr().err


def test_overlays_are_of_the_masks_that_are_there(run, restored, tmp_path):
    out, data = tmp_path / "masks", restored.data.train
    assert command(run, "--out", out, *QUICK) == 0
    assert not (out / "overlays").exists()
    assert command(run, "--out", out, *QUICK, "--overlays") == 0  # the masks stay
    for index, name in enumerate(data.ids):
        picture = overlay(data.image(index), read_mask(out / "labels" / f"{name}.png"), data.palette)
        save_image(Image.fromarray(picture), tmp_path / "picture.jpg", format="JPEG", quality=90)
        assert (out / "overlays" / f"{name}.jpg").read_bytes() == (tmp_path / "picture.jpg").read_bytes()
    before = (out / "overlays" / f"{data.ids[0]}.jpg").read_bytes()
    assert command(run, "--out", out, *QUICK[:-1], "1", "--overwrite", "--overlays") == 0
    assert (out / "overlays" / f"{data.ids[0]}.jpg").read_bytes() != before


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_summary_costs_no_masks(run, tmp_path, content):
    copy, _ = copy_of_run(run, tmp_path)
    (copy / "summary.json").write_text(content)
    assert command(copy, *QUICK) == 0
    assert json.loads((copy / "masks" / "masks.json").read_text())["ground_truth_used"] is False


@pytest.mark.parametrize(("content", "message"), [("[]", "must hold a dict, got a list"), ("{", "is not JSON")])
def test_a_document_of_a_run_names_its_file(tmp_path, content, message):
    path = tmp_path / "summary.json"
    assert read_document(path, dict) == {}
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_document(path, dict)
    assert str(path) in str(error.value)


def test_coco_json_tells_files_of_one_name_apart(tmp_path):
    names = [f"{number}.jpg" for number in range(4)]
    root = make_class_folders(tmp_path / "photos", {"cat": names, "dog": names})
    dataset = Folder.splits(root, 0.25).train
    for name in dataset.ids:
        save_mask(tmp_path / "labels" / f"{name}.png", np.zeros((40, 56), np.uint8))
    below = [dataset.path(index).relative_to(root).as_posix() for index in range(len(dataset))]
    for folder, expected in ((root, below), (tmp_path / "elsewhere", dataset.ids), (None, dataset.ids)):
        images = coco_instances(dataset, tmp_path / "labels", root=folder)["images"]
        assert [image["file_name"] for image in images] == expected
        assert len({image["file_name"] for image in images}) == len(dataset)
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    images = coco_instances(dataset, tmp_path / "labels", root=linked)["images"]
    assert all("/" in image["file_name"] for image in images)


def test_only_own_classes_are_enlarged_band_by_band(plain_run, tmp_path, monkeypatch):
    """Twelve rows at a time of an image's own classes decide as the whole of all classes does."""
    dataset, settings = restore_run(plain_run, device="cpu").data.train, dataclasses.replace(FAST, flip=True)
    refined, seen = [], []

    def keep(probabilities, images, *, method):
        refined.append(probabilities)
        return probabilities

    def spy(probabilities, *, unsure):
        seen.append(tuple(probabilities.shape))
        return decide(probabilities, unsure=unsure)

    monkeypatch.setattr(masks_module, "refine", keep)
    monkeypatch.setattr(masks_module, "decide", spy)
    monkeypatch.setattr("mcic.tiles._BAND_VALUES", 3 * 12 * 56)
    write_masks(plain_run, settings, out=tmp_path / "masks")
    assert {shape[1] for shape in seen} == {2, 3}
    assert max(np.prod(shape) for shape in seen) <= 3 * 12 * 56
    files = pixels(tmp_path / "masks")
    for name, probabilities in zip(dataset.ids, refined, strict=True):
        whole = F.interpolate(probabilities, size=(40, 56), mode="bilinear")
        label, confidence = decide(whole, unsure=0.5)
        clear = (whole.topk(2, dim=1).values.diff(dim=1).abs() > 1e-5)[0, 0] & ((whole.amax(1)[0] - 0.5).abs() > 1e-5)
        np.testing.assert_array_equal(files[f"labels/{name}.png"][clear], label[0][clear].numpy())
        np.testing.assert_allclose(files[f"confidence/{name}.png"], confidence[0].float(), atol=1)


def test_ranks_wait_for_each_other_for_hours(run, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout=None, **_: waits.append(timeout)
    )
    write_masks(run, FAST, out=tmp_path / "masks")
    assert waits[0] is not None
    assert waits[0] >= timedelta(hours=12)


def test_heatmaps_that_nobody_trained_are_refused(run, restored, tmp_path, capsys):
    write_masks(run, FAST, out=tmp_path / "masks")
    root = run.parent / f"{run.name}-data"
    groups = {"data": {"masks": str(tmp_path / "masks")}, "method": {"supervision": "masks", "context": "none"}}
    second = make_run(tmp_path / "second", root, **groups)
    assert command(second, "--source", "cam", "--out", tmp_path / "cam", *QUICK) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--source cam needs a run trained with tags" in said
    assert not (tmp_path / "cam").exists()
    assert write_masks(second, FAST)["settings"]["source"] == "network"


def test_two_commands_on_one_folder_keep_apart(tmp_path, monkeypatch):
    """Their temporary files have different names: none is renamed while the other writes it."""
    names = []
    image = Image.new("L", (2, 2))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(str(old)), replace(old, new)))
    for number in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        save_image(image, tmp_path / "0.png", format="PNG")
        write_json(tmp_path / "masks.json", {})
    assert set(names[:2]).isdisjoint(names[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "masks.json"]


def test_what_a_killed_command_left_of_the_settings_is_no_other_file(tmp_path):
    (tmp_path / ".settings.json.77.partial").write_text("{")
    (tmp_path / ".DS_Store").write_text("of the file manager")
    claim_folder(tmp_path, {"weights": "a"}, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "labels", "confidence", ".DS_Store"}
