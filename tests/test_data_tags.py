"""Tables of tags in the forms that people have them, and how their rows find the images."""

import json

import numpy as np
import pytest
from PIL import Image
from trees import make_class_folders, make_table, save_image, scene

from mcic.data.folder import read_folder
from mcic.data.images import probe_image, read_image, read_thumbnail
from mcic.data.tags import find_tables, read_table

TAGS = {"a": {"dog"}, "b": {"cat", "dog"}, "c": set(), "d": {"cat"}}


def make_images(folder, names=("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
    for place, name in enumerate(names):
        save_image(folder / name, scene(place, [1])[0])


def tags_in(root):
    """Image name → tags, and what was dropped."""
    contents = read_folder(root, 0.5)
    found = {photo.name: set(photo.tags) for photo in (*contents.train, *contents.val)}
    return found, [(entry.kind, entry.name.removeprefix(f"{root}/")) for entry in contents.dropped]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tags.csv", "image,tags\na.jpg,dog\nb.jpg,dog|cat\nc.jpg,\nd.jpg,cat\n"),
        ("tags.csv", "\ufeffimage;tags\r\na.jpg;dog\r\nb.jpg;dog\r\nb.jpg;cat\r\nc.jpg;\r\nd.jpg;cat\r\n"),
        ("tags.csv", "File Name, Labels \n a.jpg , dog\nb.jpg,\"dog, cat\"\n\nc.jpg,\nd.jpg,cat\n,,\n"),
        ("tags.csv", "path,labels\nimages/a.jpg,['dog']\nimages\\b.jpg,\"['dog', 'cat']\"\nc,[]\nD.JPG,cat\n"),
        ("labels.csv", "image_id,width,class\na,9,dog\nb,9,dog;cat\nc,9,\nd,9,cat\n"),
        ("tags.tsv", "image\ttags\na.jpg\tdog\nb.jpg\tdog|cat\nc.jpg\t\nd.jpg\tcat\n"),
        ("labels.csv", "filename,cat,dog\na.jpg,0,1\nb.jpg,1,1\nc.jpg,0,0\nd.jpg,1,0\n"),
        ("tags.json", '{"a.jpg": ["dog"], "b.jpg": "dog|cat", "c.jpg": [], "d.jpg": {"dog": false, "cat": true}}'),
        ("tags.json", '[{"image": "a.jpg", "tags": ["dog"]}, {"file_name": "b.jpg", "Labels": [{"name": "dog"}, '
                      '"cat"]},'
                      '{"image": "c.jpg", "tags": null}, ["d.jpg", ["cat"]]]'),
        ("labels.json", '{"version": 1, "images": [{"image": "a.jpg", "label": "dog"}, {"image": "b.jpg", '
                        '"label": "dog"},'
                        '{"image": "b.jpg", "label": "cat"}, {"image": "c.jpg", "label": null},'
                        '{"image": "d.jpg", "label": "cat"}]}'),
        ("metadata.jsonl", '{"file_name": "a.jpg", "tags": ["dog"]}\n{"file_name": "b.jpg", "tags": ["dog", "cat"]}\n\n'
                           '{"file_name": "c.jpg", "tags": []}\n{"file_name": "d.jpg", "tags": "cat"}\n'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["images", "."])
def test_every_table_gives_the_same_tags(tmp_path, name, text, folder):
    make_images(tmp_path / folder)
    (tmp_path / name).write_bytes(text.encode())
    assert tags_in(tmp_path) == (TAGS, [])


@pytest.mark.parametrize("images", ["JPEGImages", "images", "."])
@pytest.mark.parametrize("annotations", ["Annotations", "."])
@pytest.mark.parametrize(("root", "encoding"), [("annotation", "utf-8"), ("Annotation", "utf-16"), ("doc", "utf-8")])
def test_voc_annotations(tmp_path, images, annotations, root, encoding):
    make_images(tmp_path / images)
    (tmp_path / annotations).mkdir(exist_ok=True)
    for name, tags in TAGS.items():
        objects = "".join(f"<object><name> {tag} </name><part><name>leg</name></part></object>" for tag in sorted(tags))
        (tmp_path / annotations / f"{name}.xml").write_text(f"<{root}>{objects}</{root}>", encoding)
    assert tags_in(tmp_path) == (TAGS, [])


@pytest.mark.parametrize("name", ["annotations/instances_default.json", "_annotations.coco.json"])
def test_coco_instances(tmp_path, name):
    make_images(tmp_path / "images" / "deep")
    content = {
        "images": [{"id": 7 + i, "file_name": f"deep/{image}.jpg"} for i, image in enumerate(TAGS)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 1, "name": "unused"}],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((7, 3), (7, 3), (8, 3), (8, 9), (10, 9))],
    }
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "licence.json").write_text('{"licence": "CC0"}')
    assert tags_in(tmp_path) == ({f"deep/{image}": tags for image, tags in TAGS.items()}, [])
    content["annotations"][0]["category_id"] = 4
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not hold COCO instances: KeyError\(4\)"):
        read_folder(tmp_path, 0.5)


def test_the_first_table_counts_and_the_others_are_named(tmp_path):
    make_images(tmp_path / "images")
    (tmp_path / "tags.json").write_text('{"a.jpg": ["x"], "b.jpg": ["y"], "c.jpg": [], "d.jpg": []}')
    (tmp_path / "tags.csv").write_text("image,tags\na.jpg,dog\nb.jpg,dog|cat\nc.jpg,\nd.jpg,cat\n")
    assert [path.name for path in find_tables(tmp_path)] == ["tags.csv", "tags.json"]
    assert tags_in(tmp_path) == (TAGS, [("table", "tags.json")])


def test_validation_folders_of_other_names_and_parts_of_different_kinds(tmp_path):
    make_images(tmp_path / "train")
    (tmp_path / "train" / "tags.json").write_text('{"a": ["dog"], "b": ["cat"], "c": ["dog"], "d": ["dog"]}')
    make_class_folders(tmp_path / "valid", {"dog": ["x.jpg", "2021/y.jpg"]})
    contents = read_folder(tmp_path, 0.5)
    assert [photo.name for photo in contents.val] == ["dog/2021/y", "dog/x"]
    assert (len(contents.train), contents.held_out, contents.classes) == (4, False, ("cat", "dog"))


def test_names_find_images_by_the_end_of_a_path_or_in_other_case_but_never_by_guessing(tmp_path):
    names = ("sub/ä.b.JPG", "sub/c.png", "other/c.png", "IMG 1.jpg")
    make_images(tmp_path / "images", names)
    rows = {"ä.b": ["x"], "photos/sub/c.png": ["y"], "elsewhere/other2/c.png": ["z"], "img 1.JPEG": ["w"]}
    (tmp_path / "tags.json").write_text(json.dumps(rows), encoding="utf-8")
    found, dropped = tags_in(tmp_path)
    assert found == {"sub/ä.b": {"x"}, "sub/c": {"y"}, "IMG 1": {"w"}}
    assert dropped == [("row", "elsewhere/other2/c.png"), ("image", "images/other/c.png")]
    (tmp_path / "tags.json").write_text('{"c.png": ["y"]}')
    with pytest.raises(
        ValueError, match=r"tags.json, 'c.png': 'c.png' may be other/c.png or sub/c.png: write the whole"
    ):
        read_folder(tmp_path, 0.5)


@pytest.mark.parametrize(
    ("there", "rows", "lost"),
    [
        ("x.png", {"x.jpg": ["dog"], "x.png": ["cat"]}, "x.jpg"),
        ("sub/x.png", {"x.png": ["dog"], "sub/x.png": ["cat"]}, "x.png"),
        ("x.png", {"x.png": ["cat"], "sub/x.png": ["dog"]}, "sub/x.png"),
    ],
)
def test_the_row_of_a_missing_image_gives_its_tags_to_no_other(tmp_path, there, rows, lost):
    make_images(tmp_path / "images", [there, "y.png"])
    (tmp_path / "tags.json").write_text(json.dumps({**rows, "y.png": ["dog"]}))
    found, dropped = tags_in(tmp_path)
    assert found == {there.removesuffix(".png"): {"cat"}, "y": {"dog"}}
    assert dropped == [("row", lost)]


@pytest.mark.parametrize("spelling", ["sub/x", "SUB/X.PNG"])
def test_rows_of_two_spellings_add_up(tmp_path, spelling):
    make_images(tmp_path / "images", ["sub/x.png", "y.png"])
    (tmp_path / "tags.json").write_text(json.dumps({"sub/x.png": ["cat"], spelling: ["dog"], "y.png": ["dog"]}))
    assert tags_in(tmp_path) == ({"sub/x": {"cat", "dog"}, "y": {"dog"}}, [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tags.csv", "image;tags\na.jpg;dog;cat\n", r"tags.csv, line 2 has more columns than the header"),
        ("tags.csv", "image,tags\na.jpg,dog\n,cat\n", r"tags.csv, line 3 names no image"),
        ("tags.csv", "image,tags\n\nC:\\x\\..\\a.jpg,dog\n", r"tags.csv, line 3: 'C:\\\\x.*' leaves images/"),
        ("tags.csv", f"image,tags\na.jpg,{'x' * 200_000}\n", r"tags.csv, line \d: field larger than field limit"),
        ("tags.csv", 'image,tags\na.jpg,"dog\nb.jpg,cat\n', r"tags.csv, line 2: a quote has no end"),
        ("tags.csv", 'image,tags\na.jpg,"dog\nb.jpg,cat\nc.jpg,"bird"\nd.jpg,dog\n', r"line 2: a quote has no end"),
        ("tags.csv", 'image,tags,note\na.jpg,dog,"x\nb.jpg,cat,"y"\nc.jpg,ox,"z"\n', r"line 2: a quote has no end"),
        ("labels.csv", "image,dog,dog\na.jpg,1,0\n", r"labels.csv has several columns 'dog': a class has one"),
        ("labels.csv", "image,dog\na.jpg,1\nb.jpg,3\n", r"labels.csv, line 3 has '3' under 'dog': expected the header"),
        ("tags.json", "{", r"tags.json is not JSON: "),
        ("tags.json", "[" * 100_000, r"tags.json is not JSON: "),
        ("tags.json", "3", r'tags.json must hold \{"image": \["tag", …\]\} or a list .*, got a int'),
        ("tags.json", '{"../a.jpg": []}', r"'../a.jpg' leaves images/"),
        ("tags.json", '{"/a.jpg": []}', r"'/a.jpg' leaves images/"),
        ("tags.json", '{"a.jpg": 1.5}', r"tags.json, 'a.jpg': expected the names of its classes, got 1.5"),
        ("tags.json", '[{"tags": []}]', r'tags.json, entry 1: expected an object with "image" and "tags"'),
        ("tags.json", '[{"image": 5}]', r"tags.json, entry 1 names no image"),
        ("tags.jsonl", '{"image": "a.jpg"}\nx\n', r"tags.jsonl, line 2 is not JSON"),
        ("Annotations/a.xml", "<annotation>", r"cannot read the annotation .*a.xml"),
        ("Annotations/a.xml", '<!DOCTYPE a [<!ENTITY e "x">]><annotation>&e;</annotation>', r"Entit"),
        ("my.json", '{"images": [{"id": 1, "file_name": "/etc/a.jpg"}], "annotations": [], "categories": []}',
         r"my.json, image 1: '/etc/a.jpg' leaves images/"),
    ],
)  # fmt: skip
def test_mistakes_name_the_place(tmp_path, name, text, message):
    make_images(tmp_path / "images")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path, 0.5)


def test_rows_say_where_they_stand(tmp_path):
    (tmp_path / "tags.csv").write_text('image,tags\n"a.jpg","x"\n')
    (row,) = read_table(tmp_path / "tags.csv")
    assert (row.image, row.tags, row.where) == ("a.jpg", {"x"}, f"{tmp_path / 'tags.csv'}, line 2")


# What cannot be read


def cut(path):
    """A file that ends in the middle, as an interrupted download leaves it."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_broken_images_and_masks_are_left_out_and_the_classes_stay(tmp_path):
    make_table(tmp_path, {f"{i}.jpg": "zebra" if i == 0 else "ant" for i in range(6)} | {"8.tif": "ant"})
    Image.fromarray(np.ones((40, 56), np.float32)).save(tmp_path / "images" / "8.tif")
    cut(tmp_path / "images" / "0.jpg")
    (tmp_path / "images" / "1.jpg").write_text("<html>")
    save_image(tmp_path / "masks" / "2.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "masks" / "3.png").write_text("")
    save_image(tmp_path / "masks" / "9.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "images" / "7.heic").write_text("")
    contents = read_folder(tmp_path, 0.5)
    photos = {photo.name: photo for photo in (*contents.train, *contents.val)}
    assert photos.keys() == {"2", "3", "4", "5"}
    assert [photos[name].mask is None for name in "2345"] == [True, True, False, False]
    assert contents.classes == ("ant", "zebra")  # mask values must not shift when a file breaks
    assert [(entry.kind, entry.name[-6:]) for entry in contents.dropped] == [
        ("kind", "7.heic"), ("stray", "/9.png"), ("broken", "/0.jpg"), ("broken", "/1.jpg"), ("mask", "/2.png"),
        ("mask", "/3.png"), ("broken", "/8.tif"),
    ]  # fmt: skip
    assert "truncated" in contents.dropped[2].reason
    assert contents.dropped[4].reason == "9×9 pixels, its image 56×40"


def test_a_mask_with_values_that_are_no_class_stops_before_training(tmp_path):
    make_table(tmp_path, {"a.jpg": "ant", "b.jpg": "cat"})
    save_image(tmp_path / "masks" / "a.png", np.full((40, 56), 3, np.uint8))
    with pytest.raises(ValueError, match=r"a.png has the value 3, but there are 2 classes: expected 0…2 or 255"):
        read_folder(tmp_path, 0.5)


def test_nothing_readable_is_said(tmp_path):
    make_table(tmp_path, {"a.jpg": "ant", "b.jpg": "cat"}, masks=False)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_text("")
    with pytest.raises(ValueError, match=r"no image of .* can be read: 2 images that cannot be read \(a.jpg, b.jpg\)"):
        read_folder(tmp_path, 0.5)


def test_folders_with_images_only_deeper_are_no_classes(tmp_path):
    make_class_folders(tmp_path, {"cat": ["1.jpg", "2.jpg"], "dog": ["1.jpg"], "runs/first": ["x.png"]})
    contents = read_folder(tmp_path, 0.5)
    assert contents.classes == ("cat", "dog")
    assert [(entry.kind, entry.name) for entry in contents.dropped] == [("folder", str(tmp_path / "runs"))]


def test_probing_sees_what_is_odd_and_the_upright_size(tmp_path):
    pixels = scene(0, [1, 2])[0]
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "really.png", "JPEG")
    image.convert("CMYK").save(tmp_path / "ink.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([pixels, np.full((40, 56), 9, np.uint8)])).save(tmp_path / "glass.png")
    Image.fromarray(np.dstack([pixels, np.full((40, 56), 255, np.uint8)])).save(tmp_path / "solid.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (56, 40), "red")])
    expected = {"turned.jpg": "rotated", "really.png": "ending", "ink.jpg": "CMYK", "deep.png": "16-bit",
                "glass.png": "transparent", "moving.gif": "animated"}  # fmt: skip
    for path in tmp_path.iterdir():
        facts = probe_image(path)
        assert facts.size == read_image(path).shape[:2]
        assert facts.oddities == {expected[path.name]} if path.name in expected else not facts.oddities


def test_thumbnails_of_a_reduced_jpeg_show_the_image(tmp_path):
    pixels = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8), 100, 0), 100, 1)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert (
        np.abs(read_thumbnail(tmp_path / "a.jpg", 8).astype(int) - pixels[50::100, 50::100]).mean() < 4
    )  # edges blend


@pytest.mark.parametrize("name", ["tags.json", "tags.jsonl"])
def test_entries_that_say_nothing_of_tags_are_left_out(tmp_path, name):
    """An image without tags shows none of the classes; one whose tags nobody knows must not teach that."""
    entries = [{"image": "a.jpg", "tags": ["dog"]}, {"image": "b.jpg", "tags": []}, {"image": "c.jpg"},
               {"image": "d.jpg", "tagz": ["cat"]}]  # fmt: skip
    path = tmp_path / name
    path.write_text(json.dumps(entries) if name == "tags.json" else "\n".join(map(json.dumps, entries)))
    assert [(row.image, set(row.tags)) for row in read_table(path)] == [("a.jpg", {"dog"}), ("b.jpg", set())]
    path.write_text(json.dumps(entries[2:]) if name == "tags.json" else json.dumps(entries[2]))
    with pytest.raises(ValueError, match='no entry has "tags"'):
        read_table(path)


def test_line_separators_within_json_lines(tmp_path):
    path = tmp_path / "tags.jsonl"
    path.write_text(
        json.dumps({"image": "a.jpg", "text": "one\u2028two", "tags": ["dog"]}, ensure_ascii=False) + "\r\n"
    )
    assert [row.tags for row in read_table(path)] == [{"dog"}]


def test_tags_that_are_not_joined_by_a_bar_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "tags.csv").write_text('image,tags\na.jpg,"salt, pepper"\n')
    assert [row.tags for row in read_table(tmp_path / "tags.csv")] == [{"salt", "pepper"}]
    assert "tags are joined by ','" in caplog.text


def test_the_size_of_a_turned_tiff_is_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.tiff", "a.png", "a.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
        facts = probe_image(tmp_path / name)
        assert facts.size == read_image(tmp_path / name).shape[:2] == (60, 40), name
        assert "rotated" in facts.oddities, name


@pytest.mark.parametrize(
    "text",
    [
        'image,tags\na.jpg,"dog|cat" \n', '"image" , "tags" \n"a.jpg" ,"dog|cat"\n',
        'image,tags,note\na.jpg,dog|cat,"5" nail"\n', 'image,tags,note\na.jpg,dog|cat,"two\nlines"\n',
        "image,dog,cat,,\na.jpg,1,1,,\n",
    ],
)  # fmt: skip
def test_tables_that_spreadsheets_and_people_write(tmp_path, text):
    (tmp_path / "tags.csv").write_text(text)
    assert [(row.image, row.tags) for row in read_table(tmp_path / "tags.csv")] == [("a.jpg", {"dog", "cat"})]
