"""Bad files in numbers, the list of them that a run keeps, and what becomes of VOC and COCO with one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from badfiles import (
    DEEP,
    LAUGHS,
    RGB,
    SECRET,
    encoded,
    linked,
    make_classes,
    make_tagged,
    masked,
    state_of,
    time_limit,
)  # fmt: skip
from trees import make_coco, make_folder, make_table, make_voc

from mcic.checkpoint import newest_good
from mcic.cli import run
from mcic.cli.doctor import main as doctor
from mcic.config import DataConfig
from mcic.data import build_data, write_quarantine
from mcic.data.folder import Folder
from mcic.data.saliency import DirectorySaliency
from mcic.data.voc import VOC12
from mcic.presets import preset
from mcic.trainer import Trainer

# Too many of them, and the list that a run keeps


def make_bad(root: Path, *, good: int = 18, bad: int = 2) -> Path:
    make_table(root, {f"{place:02}.png": ("ant", "bee")[place % 2] for place in range(good + bad)}, masks=False)
    for place in range(bad):
        (root / "images" / f"{place:02}.png").write_text("no image")
    return root


def test_more_than_a_share_of_bad_images_is_refused_with_names_and_reasons(tmp_path):
    root = str(make_bad(tmp_path, good=17, bad=3))
    said = (r"3 of 20 images cannot be used, more than the 10% of --data.max-bad-share 0.1: 00.png \(cannot identify "
            r"image file .*\), 01.png .*, 02.png .*; mcic doctor lists all of them")  # fmt: skip
    with pytest.raises(ValueError, match=said):
        build_data(DataConfig(name="folder", root=root))
    assert len(build_data(DataConfig(name="folder", root=root, max_bad_share=0.15)).train) > 1
    with pytest.raises(ValueError, match=r"--data.max-bad-share must be 0…1, got 15"):
        DataConfig(max_bad_share=15)


def test_no_bad_image_at_all_can_be_asked_for(tmp_path):
    root = make_bad(tmp_path, good=19, bad=1)
    build_data(DataConfig(name="folder", root=str(root)))
    with pytest.raises(ValueError, match=r"1 of 20 images .*--data.max-bad-share 0: 00.png"):
        build_data(DataConfig(name="folder", root=str(root), max_bad_share=0))


def test_links_out_of_the_folder_count_as_bad_images(tmp_path):
    good = make_classes(tmp_path / "data")
    linked("ant/x.png", SECRET)(tmp_path / "data")
    with pytest.raises(ValueError, match=r"1 of 9 images .*x.png \(leads out of .*--data.follow-links allows it\)"):
        build_data(DataConfig(name="folder", root=str(tmp_path / "data")))
    data = build_data(DataConfig(name="folder", root=str(tmp_path / "data"), follow_links=True))
    assert {*data.train.ids, *data.val.ids} == {*good, "ant__x"}


def test_the_doctor_refuses_likewise_and_lists_them_all(tmp_path, capsys):
    root = make_bad(tmp_path, good=12, bad=6)
    small = [
        "--model.backbone",
        "tiny",
        "--model.weights",
        "none",
        "--train.size",
        "33",
        "--no-estimate",
        "--json",
        "-",
    ]
    assert run("mcic", doctor, [str(root), *small]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["error"].startswith("6 of 18 images cannot be used, more than the 10% of --data.max-bad-share")
    (finding,) = [entry for entry in report["findings"] if entry["kind"] == "dropped-broken"]
    assert [name.partition(":")[0] for name in finding["names"]] == [f"images/0{place}.png" for place in range(6)]


def test_the_doctor_prints_nothing_that_a_terminal_obeys(tmp_path, capsys):
    make_classes(tmp_path)
    (tmp_path / "ant" / "\x1b[2J.png").write_text("no image")
    (tmp_path / "ant" / "\x1b[31m.png").write_bytes(encoded(RGB))
    small = ["--model.backbone", "tiny", "--model.weights", "none", "--train.size", "33", "--no-estimate"]
    run("mcic", doctor, [str(tmp_path), *small, "--data.max-bad-share", "0.2"])
    said = capsys.readouterr().out
    assert r"ant/\x1b[2J.png: cannot identify" in said
    assert "\x1b" not in said


def test_the_quarantine_list_is_in_the_run_and_the_files_stay(tmp_path):
    root, folder = tmp_path / "data", tmp_path / "run"
    make_tagged(root)
    masked(b"no mask")(root)
    (root / "images" / "5.png").write_bytes(b"")
    linked("images/x.png", SECRET)(root)
    (root / "images" / "unused.png").write_bytes(encoded(RGB))
    os.mkfifo(os.fsencode(root / "images") + b"/caf\xe9.png")
    folder.mkdir()
    before = state_of(root)
    data = build_data(DataConfig(name="folder", root=str(root), max_bad_share=0.5))
    write_quarantine(folder, data.train.dropped)
    assert [path.name for path in folder.iterdir()] == ["quarantine.json"]
    entries = json.loads((folder / "quarantine.json").read_text())
    assert [entry.keys() for entry in entries] == [{"file", "kind", "reason"}] * 4
    assert {os.fsencode(entry["file"]): entry["kind"] for entry in entries} == {
        os.fsencode(root / "images/x.png"): "link",
        os.fsencode(root / "images") + b"/caf\xe9.png": "special",
        os.fsencode(root / "images/5.png"): "broken",
        os.fsencode(root / "masks/3.png"): "mask",
    }
    assert all(entry["reason"] for entry in entries)
    assert state_of(root) == before
    write_quarantine(folder, ())  # the run goes on after the files were mended
    assert not list(folder.iterdir())


def test_other_data_sets_have_nothing_in_quarantine(tmp_path):
    shapes = DataConfig(train_images=1, val_images=1)
    for data in map(build_data, (shapes, DataConfig(name="voc12", root=str(make_voc(tmp_path))))):
        assert not data.train.dropped


# VOC and COCO: no image is missing from them without a word


def voc(root: Path) -> Path:
    return make_voc(root) / "VOCdevkit" / "VOC2012"


def in_voc(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Write a file of VOC, or take it away."""

    def make(root):
        path = voc(root) / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    return make


def in_coco(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def make(root):
        path = make_coco(root) / "annotations" / "instances_train2014.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


IMAGE = "COCO_train2014_000000000001.jpg"
SETS = {
    "image is missing": (
        "voc12",
        in_voc("JPEGImages/2007_000001.jpg", None),
        r"lacks 1 listed images, first 2007_000001.jpg \(No such file",
    ),
    "image is empty": ("voc12", in_voc("JPEGImages/2007_000001.jpg", b""), r"2007_000001.jpg \(empty\)"),
    "image is a pipe": (
        "voc12",
        lambda root: [
            in_voc("JPEGImages/2007_000001.jpg", None)(root),
            os.mkfifo(root / "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg"),
        ],
        r"2007_000001.jpg \(no file\)",
    ),
    "mask is missing": (
        "voc12",
        in_voc("SegmentationClass/2007_000009.png", None),
        r"lacks 1 listed masks, first 2007_000009",
    ),
    "list leaves": (
        "voc12",
        in_voc("ImageSets/Segmentation/val.txt", b"../../x\n"),
        r"val.txt lists '../../x': expected ids",
    ),
    "list in UTF-16": (
        "voc12",
        in_voc("ImageSets/Segmentation/val.txt", "2007".encode("utf-16")),
        "val.txt is not text in",
    ),
    "annotation laughs": (
        "voc12",
        in_voc("Annotations/2007_000001.xml", LAUGHS.encode()),
        r"2007_000001.xml: EntitiesForb",
    ),
    "annotation is in Klingon": (
        "voc12",
        in_voc("Annotations/2007_000001.xml", b"<?xml version='1.0' encoding='klingon'?><a/>"),
        r"2007_000001.xml: LookupError",
    ),
    "folder outside": (
        "voc12",
        lambda root: [
            voc(root / "data"),
            (root / "data/VOCdevkit/VOC2012/JPEGImages").rename(root / "j"),
            (root / "data/VOCdevkit/VOC2012/JPEGImages").symlink_to(root / "j"),
        ],
        r"JPEGImages leads out of .*--data.follow-links",
    ),
    "file leaves": (
        "coco14",
        in_coco(lambda c: c["images"][1].update(file_name="../../x.jpg")),
        r"'../../x.jpg' leaves images/",
    ),
    "file is absolute": (
        "coco14",
        in_coco(lambda c: c["images"][1].update(file_name="/x.jpg")),
        r"'/x.jpg' leaves images/",
    ),
    "file twice": (
        "coco14",
        in_coco(lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"])),
        "several images of",
    ),
    "file is missing": (
        "coco14",
        lambda root: (make_coco(root) / "train2014" / IMAGE).unlink(),
        rf"first {IMAGE} \(No such file",
    ),
    "size is no number": (
        "coco14",
        in_coco(lambda c: c["images"][1].update(height=float("nan"))),
        r"\(nan, 56\): expected pixels",
    ),
    "size is huge": (
        "coco14",
        in_coco(lambda c: c["images"][1].update(height=10**9)),
        r"\(1000000000, 56\): expected pixels",
    ),
    "area is no number": ("coco14", in_coco(lambda c: c["annotations"][0].update(area=float("nan"))), "has area nan"),
    "unknown class": (
        "coco14",
        in_coco(lambda c: c["annotations"][0].update(category_id=4)),
        r"COCO instances: KeyError\(4\)",
    ),
    "other categories in val": (
        "coco14",
        in_coco(lambda c: c["categories"].append({"id": 4, "name": "bird"})),
        r"instances_train2014.json and .*instances_val2014.json must list the same .*'bird' and 'apple' as class 2",
    ),
    "fewer categories in val": (
        "coco14",
        in_coco(lambda c: c["categories"].append({"id": 99, "name": "bird"})),
        r"got 'bird' and '' as class 4",
    ),
    "deep": (
        "coco14",
        lambda root: (make_coco(root) / "annotations/instances_train2014.json").write_text("[" * DEEP),
        "is not JSON",
    ),
}


@pytest.mark.parametrize(("name", "make", "refused"), SETS.values(), ids=SETS)
def test_voc_and_coco_are_refused(tmp_path, name, make, refused):
    make(tmp_path)
    root = tmp_path / "data" if (tmp_path / "data").is_dir() else tmp_path
    before = state_of(tmp_path)
    with time_limit(), pytest.raises((ValueError, OSError), match=refused) as caught:
        build_data(DataConfig(name=name, root=str(root)))
    assert len(str(caught.value)) < 1000
    assert state_of(tmp_path) == before
    if "--data.follow-links" in refused:
        build_data(DataConfig(name=name, root=str(root), follow_links=True))


@pytest.mark.parametrize(
    "segmentation",
    [[[0, 0, 1e12, 0, 1e12, 1e12]], [[1, 2, 3]], [["a", 1, 2, 3]], [5], [[float("nan")] * 6],
     {"counts": "zzzz"},     {"counts": [1, 2]}, {"counts": [0, 10**15]},
     {"counts": [-5, 2245]}, {"counts": "é"}, {"counts": "o" * 10**5}, {}, 7],
    ids=str,
)  # fmt: skip
def test_regions_that_do_not_fit_are_no_crash(tmp_path, segmentation):
    in_coco(lambda content: content["annotations"][0].update(segmentation=segmentation))(tmp_path)
    data = build_data(DataConfig(name="coco14", root=str(tmp_path))).train
    with pytest.raises(
        ValueError, match=r"the annotations of image .*COCO_train2014_000000000000.jpg cannot be drawn: "
    ):
        data.mask(0)


def test_a_polygon_of_two_corners_encloses_nothing(tmp_path):
    in_coco(lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4]]))(tmp_path)
    data = build_data(DataConfig(name="coco14", root=str(tmp_path))).train
    place = data.mask(0)
    in_coco(lambda content: content["annotations"].pop(0))(tmp_path)
    assert (place == build_data(DataConfig(name="coco14", root=str(tmp_path))).train.mask(0)).all()


def test_a_map_that_is_missing_or_broken_is_named(tmp_path):
    data = Folder.splits(make_folder(tmp_path / "data"), 0.2).train
    source = DirectorySaliency(tmp_path)
    with pytest.raises(ValueError, match=rf"lacks image {data.ids[0]}: expected {data.ids[0]}.png or"):
        source(data, 0, data.image(0))
    (tmp_path / f"{data.ids[0]}.png").write_text("no map")
    with pytest.raises(ValueError, match=rf"cannot read the saliency map .*{data.ids[0]}.png"):
        source(data, 0, data.image(0))


def test_an_image_that_breaks_during_training_costs_no_more_than_the_way_to_the_checkpoint(tmp_path, monkeypatch):
    make_voc(tmp_path / "data", train=4, augmented=0, val=2)
    config = preset("voc12-vgg16")
    config.data.root, config.data.saliency, config.data.workers = str(tmp_path / "data"), "none", 0
    config.model.backbone, config.model.weights, config.train.size, config.train.batch_size = "tiny", "none", 33, 2
    config.train.epochs, config.run.dir, config.run.device = 3, str(tmp_path / "run"), "cpu"
    config.run.tensorboard = False
    reads, image = [], VOC12.image

    def breaking(self, index):
        reads.append(index)
        if len(reads) == 7 + 4:  # in the second epoch; 4 previews were drawn after the first
            self.path(index).write_bytes(b"no image")
        return image(self, index)

    monkeypatch.setattr(VOC12, "image", breaking)
    with pytest.raises(ValueError, match=r"cannot read the image .*JPEGImages/2007_00000\d.jpg: cannot identify"):
        Trainer(config).fit()
    assert newest_good(tmp_path / "run" / "checkpoints") is not None
