"""`mcic doctor`: what it finds in a folder, what it says of a run, and how it exits."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from trees import make_class_folders, make_table, save_image, scene

from mcic.cli import run
from mcic.cli.doctor import main
from mcic.data.voc import CLASSES
from mcic.doctor import CLEAN, FAILS, LOOK, examine
from mcic.doctor_data import _same_name
from mcic.log import setup_logging
from mcic.presets import preset

SMALL = ["--model.backbone", "tiny", "--model.weights", "none", "--train.size", "33", "--run.device", "cpu"]


def doctor(*argv):
    return run("mcic", main, [*map(str, argv), *SMALL])


def make_clean(root, count=60):
    """Two classes, both often alone; images of 100×80 pixels of which no two look alike."""
    tags = {f"{place:02}.png": ("ant", "bee", "ant|bee")[place % 3] for place in range(count)}
    make_table(root, tags, masks=False)
    for place, name in enumerate(tags):
        pattern(place).save(root / "images" / name)
    return root, tags


def pattern(seed):
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((100, 80))


def write_tags(root, tags):
    (root / "tags.csv").write_text("image,tags\n" + "".join(f"{name},{joined}\n" for name, joined in tags.items()))


def found(root, **config):
    """Findings by kind; the status must follow from them."""
    settings = preset("folder")
    settings.data.root = str(root)
    settings.model.backbone, settings.model.weights, settings.train.size = "tiny", "none", 33
    for name, value in config.items():
        setattr(settings.data, name, value)
    report = examine(settings, estimate=False)
    assert report.error is None
    assert report.status == (LOOK if any(entry.level != "note" for entry in report.findings) else CLEAN)
    return {entry.kind: entry for entry in report.findings}


@pytest.fixture
def clean(tmp_path):
    return make_clean(tmp_path / "photos")[0]


def test_a_clean_folder_exits_with_0_and_an_estimate_from_real_steps(clean, capfd):
    before = {path: path.stat().st_mtime_ns for path in clean.rglob("*")}
    assert doctor(clean) == CLEAN
    out, err = capfd.readouterr()
    assert err == ""
    assert "training images" in out.splitlines()[0]
    for words in ("ant", "bee", "train.batch-size", "an estimate from a few steps", "GiB", "Clean: nothing to do."):
        assert words in out
    assert {path: path.stat().st_mtime_ns for path in clean.rglob("*")} == before


def test_the_json_holds_everything_and_stdout_nothing_else(clean, capsys):
    setup_logging()  # as a command before it in the same process would
    assert doctor(clean, "--json", "-") == CLEAN
    content = json.loads(capsys.readouterr().out)
    assert content["status"] == 0
    assert content["train"] + content["val"] == 60
    assert content["held_out"]
    assert [entry["name"] for entry in content["classes"]] == ["ant", "bee"]
    assert sum(entry["train"] + entry["val"] for entry in content["classes"]) == 80
    assert content["tags_per_image"] == pytest.approx(80 / 60, abs=0.01)
    assert content["settings"]["train.size"] == 33
    cost = content["estimate"]
    assert cost["steps"] == content["settings"]["train.epochs"] * (content["train"] // 8)
    assert cost["training_seconds"] >= cost["steps"] * cost["seconds_per_step"] > 0
    assert cost["first_read_seconds"] >= cost["read_seconds"] > 0
    assert 0.1 < cost["memory_gib"] < 50
    assert cost["evaluation_seconds"] > 0


def test_a_file_gets_the_json_and_only_a_json_file(clean, tmp_path, capsys):
    assert doctor(clean, "--no-estimate", "--json", tmp_path / "o.json") == CLEAN
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["estimate"] is None
    assert content["settings"]["train.size"] == 33
    assert doctor(clean, "--no-estimate", "--json", tmp_path / "o.json") == CLEAN  # in the place of the earlier one
    table = clean / "tags.json"
    for text in ('{"00.png": ["ant"]}', "[]", "{"):
        table.write_text(text)
        assert doctor(clean, "--json", table) == 2
        assert f"--json {table} is a file of another kind" in capsys.readouterr().err
        assert table.read_text() == text
    photo = clean / "images" / "00.png"
    before = photo.read_bytes()
    for target in (photo, tmp_path / "gone" / "o.json"):
        assert doctor(clean, "--json", target) == 2
        assert "--json takes - or a file that ends with .json" in capsys.readouterr().err
    assert photo.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.json", "photos"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.batch-size", "64"], r"photos has .* training images, fewer than one batch of 64"),
        (["--train.size", "32"], r"--train.size must be a multiple of the output stride 4 plus 1"),
        (["--data.saliency", "/nowhere"], r"--data.saliency must be auto, none or a folder of maps"),
    ],
)
def test_what_training_would_refuse_is_said_in_its_words(clean, capsys, argv, message):
    assert run("mcic", main, [str(clean), "--no-estimate", *SMALL, *argv]) == FAILS
    out = capsys.readouterr().out
    assert re.search(f"^error: {message}", out, re.MULTILINE)
    assert "Training would fail." in out
    assert "ant" in out  # what could be read is still described


def test_a_map_that_is_missing_shows_when_steps_are_measured(clean, tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    assert doctor(clean, "--data.saliency", tmp_path / "maps") == FAILS
    assert "lacks image" in capsys.readouterr().out


@pytest.mark.parametrize("made", [None, "file", "empty", "table"])
def test_folders_that_cannot_be_read_exit_with_2_and_one_sentence(tmp_path, capsys, made):
    root = tmp_path / "photos"
    if made == "file":
        root.write_text("")
    elif made is not None:
        root.mkdir()
    if made == "table":
        save_image(root / "images" / "a.png", scene(0, [1])[0])
        (root / "tags.csv").write_text("what\n")
    assert doctor(root) == FAILS
    out, err = capsys.readouterr()
    assert out.startswith("error: ")
    assert out.endswith("Training would fail.\n")
    assert len(out.splitlines()) == 2
    assert err == ""


def test_command_line_mistakes(capsys, clean):
    for argv, message in [
        ([], "Missing"), ([clean, "--jsn", "x"], "--jsn"), ([clean, "--train.epoch", "3"], "did you mean"),
        ([clean, "--data.name", "shapes"], "only folders of photographs"),
    ]:  # fmt: skip
        assert run("mcic", main, list(map(str, argv))) == 2
        err = capsys.readouterr().err
        assert err.startswith("mcic: error: ")
        assert message in err
        assert len(err.splitlines()) == 1


def test_what_is_left_out_is_named_with_its_reason(tmp_path, capsys):
    root, tags = make_clean(tmp_path)
    (root / "images" / "00.png").write_text("<html>")
    save_image(root / "masks" / "01.png", np.zeros((3, 3), np.uint8))
    pattern(99).save(root / "images" / "more.png")
    write_tags(root, {**tags, "gone.png": "ant"})
    kinds = found(root)
    assert {kind: entry.names for kind, entry in kinds.items()} == {
        "dropped-row": ("gone.png",),
        "dropped-image": ("images/more.png",),
        "dropped-broken": (f"images/00.png: cannot identify image file '{root / 'images' / '00.png'}'",),
        "dropped-mask": ("masks/01.png: 3×3 pixels, its image 100×80",),
    }
    assert doctor(root, "--no-estimate") == LOOK
    assert "images that cannot be read: left out" in capsys.readouterr().out


def test_classes_that_tags_cannot_teach(tmp_path):
    root, tags = make_clean(tmp_path)
    tags = {name: f"{joined}|all" for name, joined in tags.items()}
    for name in list(tags)[::2]:
        tags[name] += "|left|right"
    tags["00.png"] += "|once"
    tags["01.png"] = ""
    write_tags(root, tags)
    kinds = found(root, val_share=0.3)
    assert kinds["everywhere"].names[0].startswith("all (")
    assert "cannot be learnt from tags" in kinds["everywhere"].text
    assert kinds["together"].names == ("left + right",)
    assert kinds["rare"].names in (("once (1)",), ("once (0)",))
    assert kinds["untagged"].names == ("01",)
    assert kinds["untagged"].level == "note"
    assert kinds.keys() <= {"everywhere", "together", "rare", "untagged", "unmeasured"}


def test_a_class_without_validation_images_is_a_note_and_notes_alone_are_clean(tmp_path):
    files = [*(f"train/{tag}/{place}.png" for tag in ("ant", "bee") for place in range(12)), "val/ant/v.png"]
    for place, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        pattern(place).save(tmp_path / file)
    kinds = found(tmp_path)
    assert kinds.keys() == {"unmeasured"}
    assert kinds["unmeasured"].names == ("bee",)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("dog", "Dog", True), ("dog", "dogs", True), ("bus", "buses", True), ("berry", "berries", True),
        ("Leaf", "leaves", True), ("woman", "women", True), ("teddy bear", "teddy_bear", True), ("sofa", "soffa", True),
        ("bicycle", "bicylce", True), ("cat", "car", False), ("boat", "goat", False), ("horse", "house", False),
        ("class 1", "class 2", False), ("person_1", "person_2", False), ("gas", "ga", False), ("cat", "dog", False),
    ],
)  # fmt: skip
def test_near_miss_names(first, second, same):
    assert _same_name(first, second) is same
    assert _same_name(second, first) is same


def test_near_miss_names_are_found(tmp_path):
    root, tags = make_clean(tmp_path)
    write_tags(root, {name: joined.replace("bee", "Ants") if name > "30" else joined for name, joined in tags.items()})
    assert found(root)["names"].names == ("Ants / ant",)


def test_the_classes_of_the_field_are_no_near_misses():
    assert not [pair for pair in combinations(CLASSES, 2) if _same_name(*pair)]


def test_odd_images_are_looked_at_or_noted(tmp_path):
    root, _ = make_clean(tmp_path)
    images = root / "images"
    image = Image.open(images / "00.png")
    image.convert("CMYK").save(images / "00.png", "JPEG")
    pattern(500).resize((30, 40)).save(images / "01.png")
    (images / "02.png").unlink()
    Image.new("RGB", (8000, 5001), "green").save(images / "02.jpg")
    kinds = found(root)
    assert kinds["CMYK"].names == kinds["ending"].names == ("images/00.png",)
    assert (kinds["CMYK"].level, kinds["ending"].level) == ("look", "note")
    assert kinds["tiny"].names == ("images/01.png (30×40)",)
    assert kinds["huge"].names == ("images/02.jpg (8000×5001)",)
    assert kinds.keys() == {"CMYK", "ending", "tiny", "huge"}


def test_duplicates_near_ones_leaks_and_conflicts(tmp_path):
    tags = {f"train/{place:02}.png": ("ant", "bee")[place % 2] for place in range(30)}
    tags |= {f"val/{place:02}.png": ("ant", "bee")[place % 2] for place in range(6)}
    for place, (name, tag) in enumerate(tags.items()):
        part, file = name.split("/")
        (tmp_path / part / tag).mkdir(parents=True, exist_ok=True)
        pattern(place).save(tmp_path / part / tag / file)
    ants, bees, val = (tmp_path / name for name in ("train/ant", "train/bee", "val/ant"))
    (ants / "copy.png").write_bytes((ants / "00.png").read_bytes())
    (bees / "other.png").write_bytes((ants / "02.png").read_bytes())
    Image.open(ants / "04.png").resize((140, 120)).save(val / "again.jpg", quality=70)
    Image.open(bees / "05.png").resize((70, 80)).save(bees / "less.jpg", quality=70)
    kinds = found(tmp_path)
    assert kinds["duplicate"].names == (
        "train/ant/00.png = train/ant/copy.png", "train/ant/02.png = train/bee/other.png"
    )  # fmt: skip
    assert kinds["conflict"].names == ("train/ant/02.png = train/bee/other.png",)
    assert kinds["leak"].names == ("train/ant/04.png = val/ant/again.jpg",)
    assert kinds["similar"].names == ("train/bee/05.png = train/bee/less.jpg",)


def test_many_classes_stay_one_page(tmp_path, capsys):
    names = [f"kind {chr(97 + place // 26)}{chr(97 + place % 26)}" for place in range(70)]
    make_class_folders(tmp_path, {name: ["1.png", "2.png"] for name in names})
    assert doctor(tmp_path, "--no-estimate") == LOOK
    out = capsys.readouterr().out
    assert "41 classes with more" in out
    assert len(out.splitlines()) < 90
