"""VOC, COCO and a user's own folder, read from small trees."""

import json
import logging
import os
import shutil
import unicodedata

import numpy as np
import pytest
from trees import COLOURS, make_class_folders, make_coco, make_folder, make_table, make_voc, save_image, scene

from mcic.config import DataConfig
from mcic.data import build_data, eval_items
from mcic.data.coco import COCO14
from mcic.data.folder import Folder, read_folder
from mcic.data.voc import CLASSES, VOC12


def tags_of(dataset, index):
    return {dataset.classes[k] for k in np.flatnonzero(dataset.tags[index])}


def check_masks(dataset):
    """Every mask fits its image, shows exactly the tags, and the image shows the mask's colours."""
    for item in eval_items(dataset, None):
        labels = set(item.mask.unique().tolist()) - {0, 255}
        assert labels == {dataset.classes.index(tag) + 1 for tag in tags_of(dataset, item.index)}
        for label in labels:
            shown = item.pixels[item.mask.numpy() == label].mean(0)
            np.testing.assert_allclose(shown, 65 + COLOURS[label] // 2, atol=25)


# VOC


def test_voc_with_augmented_masks(tmp_path):
    root = make_voc(tmp_path, train=4, augmented=5, val=3)
    train, val = VOC12(root, "train"), VOC12(root, "val")
    assert (len(train), len(val)) == (9, 3)
    assert not set(train.ids) & set(val.ids)
    assert train.ids == sorted(train.ids)
    assert train.classes == CLASSES
    assert train.palette.shape == (21, 3)
    assert tags_of(train, 1) == {"bicycle", "person"}
    check_masks(train)
    check_masks(val)


def test_voc_without_augmented_masks_and_from_every_root(tmp_path):
    make_voc(tmp_path, train=4, augmented=0, val=3)
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        assert len(VOC12(str(root), "train")) == 4
    check_masks(VOC12(tmp_path, "train"))


def test_voc_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"--data.root has no JPEGImages/: expected the VOCdevkit/VOC2012 folder"):
        VOC12(tmp_path, "train")
    base = make_voc(tmp_path) / "VOCdevkit" / "VOC2012"
    first = base / "Annotations" / "2007_000000.xml"
    text = first.read_text()
    first.unlink()
    with pytest.raises(ValueError, match=r"2007_000000 has no annotation"):
        VOC12(tmp_path, "train")
    first.write_text(text.replace("aeroplane", "aeroplan"))
    with pytest.raises(ValueError, match=r"'aeroplan'.*did you mean 'aeroplane'"):
        VOC12(tmp_path, "train")
    first.write_text(text[:30])
    with pytest.raises(ValueError, match=r"cannot read the annotation .*2007_000000.xml"):
        VOC12(tmp_path, "train")
    first.write_text('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>&e;</annotation>')
    with pytest.raises(ValueError, match=r"cannot read the annotation .*Entit"):
        VOC12(tmp_path, "train")
    first.write_text(text)
    (base / "JPEGImages" / "2007_000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 listed images, first 2007_000002.jpg"):
        VOC12(tmp_path, "train")
    (base / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"no ImageSets/Segmentation/val.txt"):
        VOC12(tmp_path, "val")


# COCO


def test_coco_classes_tags_and_sizes(tmp_path):
    make_coco(tmp_path, train=6, val=3)
    train, val = COCO14(tmp_path, "train"), COCO14(tmp_path, "val")
    assert train.classes == val.classes == ("kite", "apple", "boat")
    assert (len(train), len(val)) == (5, 3)  # the image without objects is kept in val only
    assert tags_of(train, 0) == {"kite", "apple", "boat"}
    assert tags_of(train, 1) == {"apple"}
    assert tags_of(val, 2) == set()
    assert train.ids[0] == "COCO_train2014_000000000000"
    assert train.image(0).shape == (40, 56, 3)


def test_coco_masks_put_small_on_large_and_crowds_below(tmp_path):
    data = COCO14(make_coco(tmp_path), "train")
    expected = np.full((40, 56), 255, np.uint8)
    expected[10:30, 10:30] = 1
    expected[15:20, 15] = 3
    np.testing.assert_array_equal(data.mask(0), expected)
    assert set(np.unique(data.mask(1))) == {0, 2}
    assert COCO14(tmp_path, "val").mask(2).max() == 0


def test_coco_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no annotations/instances_train2014.json: expected a folder with"):
        COCO14(tmp_path, "train")
    make_coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match=r"instances_val2014.json does not hold COCO instances"):
        COCO14(tmp_path, "val")
    monkeypatch.setattr("mcic.data.coco.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        COCO14(tmp_path, "train")


# A user's own folder


def test_folder_with_train_val_and_classes(tmp_path):
    splits = Folder.splits(make_folder(tmp_path), 0.2)
    assert (len(splits.train), len(splits.val)) == (8, 4)
    assert splits.train.classes == splits.val.classes == ("ant", "cat", "dog")
    assert splits.train.palette.shape == (4, 3)
    assert tags_of(splits.train, splits.train.ids.index("train_2")) == {"ant", "cat"}
    check_masks(splits.train)
    check_masks(splits.val)


def test_classes_file_sets_the_order_and_is_also_found_in_train(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "classes.txt").rename(tmp_path / "train" / "classes.txt")
    (tmp_path / "train" / "classes.txt").write_text("\ufeffdog\ncat\nant\nbee\n\n", encoding="utf-8")
    assert Folder.splits(tmp_path, 0.2).val.classes == ("dog", "cat", "ant", "bee")


def test_held_out_images_stay_when_others_are_added(tmp_path):
    names = {f"{i}.jpg": "cat" if i % 2 else "dog" for i in range(60)}
    make_table(tmp_path / "a", dict(list(names.items())[:40]), masks=False)
    make_table(tmp_path / "b", names, masks=False)
    few, many = Folder.splits(tmp_path / "a", 0.3), Folder.splits(tmp_path / "b", 0.3)
    assert set(few.val.ids) <= set(many.val.ids)
    assert set(few.train.ids) <= set(many.train.ids)
    assert len(few.train) + len(few.val) == 40
    assert 10 <= len(many.val) <= 26
    assert few.val.mask(0) is None


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_neither_side_is_ever_empty(tmp_path, share):
    make_table(tmp_path, {"a.jpg": "x", "b.jpg": "x"})
    splits = Folder.splits(tmp_path, share)
    assert (len(splits.train), len(splits.val)) == (1, 1)


def test_a_single_image_cannot_be_split(tmp_path):
    make_table(tmp_path, {"a.jpg": "x"})
    with pytest.raises(ValueError, match="has 1 image"):
        Folder.splits(tmp_path, 0.2)


def test_table_rows_without_extension_in_folders_with_unicode_and_without_tags(tmp_path):
    make_table(tmp_path, {"café.jpg": "naïve", "sub/dir/b.PNG": "x|naïve", "none.webp": "", "c.bmp": "x"})
    decomposed = unicodedata.normalize("NFD", "café")
    rows = f"image,tags,note\n{decomposed},naïve,\nsub\\dir\\b,x | naïve |,hi\nnone.webp,,\nc.bmp,x\nc.bmp,naïve\n"
    (tmp_path / "tags.csv").write_text(rows, encoding="utf-8-sig")
    splits = Folder.splits(tmp_path, 0.5)
    found = {d.ids[i]: tags_of(d, i) for d in (splits.train, splits.val) for i in range(len(d))}
    assert found == {"café": {"naïve"}, "sub__dir__b": {"x", "naïve"}, "none": set(), "c": {"x", "naïve"}}
    masks = [d.mask(i) for d in (splits.train, splits.val) for i in range(len(d))]
    assert all(mask is not None for mask in masks)


def test_rows_and_images_without_partner_are_dropped_with_one_warning(tmp_path, caplog):
    make_table(tmp_path, {f"{i}.jpg": "x" for i in range(6)})
    (tmp_path / "tags.csv").write_text("image,tags\n0.jpg,x\n1.jpg,x\ngone.jpg,x\n")
    with caplog.at_level(logging.WARNING):
        splits = Folder.splits(tmp_path, 0.5)
    assert len(splits.train) + len(splits.val) == 2
    (record,) = caplog.records
    said = "1 rows without an image (gone.jpg) and 4 images without a row (2.jpg, 3.jpg, 4.jpg, …) left out"
    assert said in record.message


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,tags\n../a.jpg,x\n", r"line 2: '../a.jpg' leaves images/"),
        ("image,tags\n/etc/a.jpg,x\n", r"leaves images/"),
        ("photo,what\na.jpg,x\n", r"must have the header image,tags; its first line is 'photo,what'"),
        ("", r"must have the header image,tags"),
        ("image,tags\na.jpg,x,y\n", r"line 2 has more columns"),
        ("image,tags\nz.jpg,x\n", r"no row of .*tags.csv names an image"),
        (
            "image,tags\na.jpg,cta\nb.jpg,cat\n",
            r"a.jpg has the tag 'cta', which is not in .*classes.txt; did you mean 'cat'",
        ),
    ],
)
def test_tables_that_are_wrong_say_so(tmp_path, table, message):
    make_table(tmp_path, {"a.jpg": "cat", "b.jpg": "cat"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "tags.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        Folder.splits(tmp_path, 0.5)


def test_other_encodings_are_named(tmp_path):
    make_table(tmp_path, {"a.jpg": "café", "b.jpg": "x"}, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tags.csv is not text in UTF-8"):
        Folder.splits(tmp_path, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("cat\n\ndog\n", "line 2 is empty"), ("cat\ncat\n", "'cat' more than once"), ("", "names no class"),
     ("\n".join(map(str, range(255))), "at most 254")],
)  # fmt: skip
def test_class_files_that_are_wrong_say_so(tmp_path, text, message):
    make_table(tmp_path, {"a.jpg": "cat", "b.jpg": "cat"})
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        Folder.splits(tmp_path, 0.5)


def test_one_folder_per_class(tmp_path):
    hidden = {".hidden": ["3.jpg"], "__MACOSX": ["4.jpg"], "cat/__pycache__": ["5.jpg"]}
    files = {"cat": ["1.jpg", "2.png"], "dog": ["1.jpg"], "__bird": ["__6.jpg"], "masks": ["1.png"]}
    make_class_folders(tmp_path, hidden | files)
    (tmp_path / "dog" / "2.png").write_bytes((tmp_path / "cat" / "2.png").read_bytes())
    splits = Folder.splits(tmp_path, 0.3)
    found = {d.ids[i]: tags_of(d, i) for d in (splits.train, splits.val) for i in range(len(d))}
    assert found == {"cat__1": {"cat"}, "cat__2": {"cat", "dog"}, "dog__1": {"dog"}, "__bird____6": {"__bird"}}


@pytest.mark.parametrize("name", ["catalog.xml", "._cat.xml", "._tags.json", "annotations/._cat.xml"])
def test_files_beside_the_classes_that_are_no_tables(tmp_path, name):
    make_class_folders(tmp_path, {"cat": ["1.jpg", "2.jpg"], "dog": ["1.jpg"]})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('<annotations>{"images": [], "annotations": [], "categories": []}</annotations>')
    assert read_folder(tmp_path, 0.3).classes == ("cat", "dog")


def test_class_folders_below_train_and_val_and_a_class_called_train(tmp_path):
    parts = {f"{part}/{name}": [f"{part}.jpg"] for part in ("train", "val") for name in ("car", "train")}
    splits = Folder.splits(make_class_folders(tmp_path / "a", parts), 0.2)
    assert (splits.train.ids, splits.val.classes) == (["car__train", "train__train"], ("car", "train"))
    splits = Folder.splits(make_class_folders(tmp_path / "b", {"car": ["1.jpg"], "train": ["2.jpg"]}), 0.5)
    assert splits.train.classes == ("car", "train")


def test_masks_of_class_folders_are_found_by_path_id_or_unique_name(tmp_path):
    make_class_folders(tmp_path, {"cat": ["1.jpg", "2.jpg"], "dog": ["1.jpg", "3.jpg", "4.jpg"]})
    (tmp_path / "classes.txt").write_text("cat\ndog\nant\nbee\n")
    make = {"cat/1": 1, "cat__2": 2, "3": 3, "1": 4}
    for name, value in make.items():
        save_image(tmp_path / "masks" / f"{name}.png", np.full((40, 56), value, np.uint8))
    splits = Folder.splits(tmp_path, 0.3)
    masks = {d.ids[i]: d.mask(i) for d in (splits.train, splits.val) for i in range(len(d))}
    values = {name: None if mask is None else mask[0, 0] for name, mask in masks.items()}
    assert values == {"cat__1": 1, "cat__2": 2, "dog__1": None, "dog__3": 3, "dog__4": None}


def test_two_files_of_one_stem_have_their_endings_in_their_ids(tmp_path):
    make_table(tmp_path, {"a.jpg": "cat", "a.png": "dog", "b.png": "cat"}, masks=False)
    splits = Folder.splits(tmp_path, 0.5)
    found = {d.ids[i]: tags_of(d, i) for d in (splits.train, splits.val) for i in range(len(d))}
    assert found == {"a.jpg": {"cat"}, "a.png": {"dog"}, "b": {"cat"}}
    for name, value in {"a": 1, "a.png": 2, "b": 1}.items():
        save_image(tmp_path / "masks" / f"{name}.png", np.full((40, 56), value, np.uint8))
    contents = read_folder(tmp_path, 0.5)
    masks = {photo.id: photo.mask and photo.mask.name for photo in (*contents.train, *contents.val)}
    assert masks == {"a.jpg": None, "a.png": "a.png.png", "b": "b.png"}
    assert [(entry.kind, entry.name) for entry in contents.dropped] == [("stray", str(tmp_path / "masks" / "a.png"))]
    (tmp_path / "tags.csv").write_text("image,tags\na,cat\nb,cat\n")
    with pytest.raises(ValueError, match=r"line 2: 'a' may be a.jpg or a.png: write the whole path, with its ending"):
        Folder.splits(tmp_path, 0.5)


def test_two_images_that_would_have_one_id_are_refused(tmp_path):
    make_table(tmp_path, {"a/b.jpg": "cat", "a__b.jpg": "cat"}, masks=False)
    with pytest.raises(ValueError, match=r"several images of the id 'a__b.jpg', .*a/b.jpg and .*a__b.jpg: rename all"):
        Folder.splits(tmp_path, 0.5)


@pytest.mark.parametrize("made", [["images/a.jpg"], ["tags.csv"], [], ["train/a.jpg", "val/b.jpg"], ["a.jpg"]])
def test_folders_without_layout_say_what_is_expected(tmp_path, made):
    for name in made:
        save_image(tmp_path / name, scene(0, [1])[0]) if name.endswith("jpg") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"--data.root has no .*expected images/ and tags.csv"):
        Folder.splits(tmp_path, 0.5)


# The door


def test_subsets_keep_everything_in_step(tmp_path):
    sets = [
        VOC12(make_voc(tmp_path / "voc"), "train"),
        COCO14(make_coco(tmp_path / "coco"), "train"),
        Folder.splits(make_folder(tmp_path / "folder"), 0.2).train,
    ]
    for data in sets:
        before = {data.ids[i]: (data.tags[i], data.image(i), data.mask(i)) for i in range(len(data))}
        data.subset(3)
        assert len(data) == len(data.tags) == 3
        for i in range(3):
            for now, then in zip((data.tags[i], data.image(i), data.mask(i)), before[data.ids[i]], strict=True):
                np.testing.assert_array_equal(now, then)


def test_images_without_ground_truth_are_not_among_those_to_measure(tmp_path):
    root = make_folder(tmp_path / "folder")
    masks = sorted((root / "train" / "masks").iterdir())
    for path in masks[2:]:
        path.unlink()
    data = Folder.splits(root, 0.2).train
    for count, expected in ((None, 2), (1, 1)):
        part = data.measured(count)
        assert [part.mask(index) is not None for index in range(len(part))] == [True] * expected
    assert len(data) == 8
    for path in masks[:2]:
        path.unlink()
    assert len(Folder.splits(root, 0.2).train.measured(3)) == 0


def test_build_data(tmp_path):
    voc = build_data(DataConfig(name="voc12", root=str(make_voc(tmp_path / "voc")), train_images=5, val_images=2))
    assert (len(voc.train), len(voc.val), voc.train.name) == (5, 2, "voc12")
    assert build_data(DataConfig(name="coco14", root=str(make_coco(tmp_path / "coco")))).val.name == "coco14"
    assert build_data(DataConfig(name="folder", root=str(make_folder(tmp_path / "mine")))).val.name == "mine"
    shapes = build_data(DataConfig(name="shapes", train_images=3, val_images=2))
    assert (len(shapes.train), len(shapes.val)) == (3, 2)


@pytest.mark.parametrize("name", ["voc12", "coco14", "folder"])
def test_a_missing_root_names_flag_and_layout(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} needs --data.root: .*(JPEGImages|instances|tags.csv)"):
        build_data(DataConfig(name=name))
    with pytest.raises(ValueError, match=r"--data.root .*gone is no folder: expected "):
        build_data(DataConfig(name=name, root=str(tmp_path / "gone")))


def test_no_images_at_all_is_refused():
    with pytest.raises(ValueError, match=r"--data.train-images must be 1 or more"):
        build_data(DataConfig(train_images=0))


def test_long_names_and_names_that_are_no_text_have_ids_that_files_can_have(tmp_path):
    root = tmp_path / "data"
    for name in ("a" * 120 + "/" + "b" * 120 + "1.png", "a" * 120 + "/" + "b" * 120 + "2.png", "é" * 90 + ".png"):
        save_image(root / "images" / name, scene(0, [1])[0])
    odd = os.fsencode(root / "images") + b"/\xff\xfe.png"
    os.rename(os.fsencode(root / "images" / ("é" * 90 + ".png")), odd)
    names = sorted(path.relative_to(root / "images").as_posix() for path in (root / "images").rglob("*.png"))
    (root / "tags.json").write_text(json.dumps({name: ["dog"] for name in names}))
    splits = Folder.splits(root, 0.4)
    ids = [*splits.train.ids, *splits.val.ids]
    assert len(set(ids)) == 3
    assert max(len(os.fsencode(name)) for name in ids) <= 200


def test_a_class_called_background_is_refused_with_the_way_out(tmp_path):
    for name in ("background", "dog"):
        for number in range(2):
            save_image(tmp_path / name / f"{name}{number}.png", scene(number, [1])[0])
    with pytest.raises(ValueError, match="leave the tags of images without an object empty"):
        Folder.splits(tmp_path, 0.4)


def test_val_beside_images_and_tags_in_the_root_is_val(tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "train" / "images").rename(root / "images")
    (root / "train" / "tags.csv").rename(root / "tags.csv")
    shutil.rmtree(root / "train")
    contents = read_folder(root, 0.2)
    assert not contents.held_out
    assert {photo.path.parent for photo in contents.train} == {root / "images"}
    assert all(photo.path.is_relative_to(root / "val") for photo in contents.val)


@pytest.mark.parametrize("images", ["", "images"])
def test_one_table_that_names_train_and_val_makes_the_sides(tmp_path, images):
    rows = ["image,tags"]
    for index in range(12):
        part = "Val" if index % 3 == 0 else "train"
        save_image(tmp_path / images / part / f"{index}.png", scene(index, [1])[0])
        rows.append(f"{part}/{index}.png,a")
    (tmp_path / "tags.csv").write_text("\n".join(rows))
    contents = read_folder(tmp_path, 0.2)
    assert not contents.held_out
    assert {photo.path.parent.name for photo in contents.train} == {"train"}
    assert [photo.path.stem for photo in contents.val] == ["0", "3", "6", "9"]


def test_what_lies_beside_the_parts_is_named(tmp_path, caplog):
    root = make_folder(tmp_path / "data")
    (root / "val").rename(root / "Val")
    for name in ("masks", "test"):
        save_image(root / name / "0.png", scene(0, [1])[0])
    folder = tmp_path / "classes"
    for index, name in enumerate(("dog/0.png", "dog/1.png", "cat/2.png", "extra.png")):
        save_image(folder / name, scene(index, [1])[0])
    assert not read_folder(root, 0.2).held_out
    Folder.splits(root, 0.2)
    Folder.splits(folder, 0.2)
    assert "1 folders of masks beside train/, where none are looked for (masks)" in caplog.text
    assert "1 folders beside those that are read (test)" in caplog.text
    assert "1 images beside the folders of the classes (extra.png)" in caplog.text


def test_a_validation_root_is_for_tars_and_a_relative_root_says_where_it_was_looked_for(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data")
    with pytest.raises(ValueError, match=r"--data\.val-root is for sets in tars"):
        build_data(DataConfig(name="folder", root=str(root), val_root=str(root)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--data.root photos is no folder in {tmp_path}"):
        build_data(DataConfig(name="folder", root="photos"))


@pytest.mark.parametrize("name", ["val/images/9.png", "val/notes.xml", "val/tags.csv"])
def test_a_val_that_does_not_stand_alone_is_no_val(tmp_path, name):
    make_table(tmp_path, {f"{index}.png": "a" for index in range(6)})
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    save_image(path, scene(9, [1])[0]) if path.suffix == ".png" else path.write_text("image,tags\n")
    assert read_folder(tmp_path, 0.3).held_out


def test_the_usual_spelling_of_val_counts(tmp_path):
    root = make_folder(tmp_path / "data")
    shutil.copytree(root / "val", root / "Validation")
    contents = read_folder(root, 0.2)
    assert all(photo.path.is_relative_to(root / "val") for photo in contents.val)


def test_shapes_read_no_folder(tmp_path):
    with pytest.raises(ValueError, match="shapes are made at run time and read no folder"):
        build_data(DataConfig(root=str(tmp_path)))
