"""`mcic predict`: files in, files out, and nothing of the user's is touched."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from networks import photo
from PIL import Image

import mcic
from mcic.areas import AreaTable
from mcic.cli import run
from mcic.cli.predict import main
from mcic.data.images import read_mask
from mcic.predictions import find_images, predict_files, tags_of_images
from mcic.segmentation import Segmentation


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two images of one name in two folders, one of another kind beside them, one that is broken, and a text."""
    for place, name in enumerate(("a/x.jpg", "b/x.jpg", "a/x.png", "b/ü ö.bmp")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(40, 50, place)).save(path)
    (tmp_path / "photos" / "a" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "areas.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def predicted(predictor, sources, out: Path, **settings):
    return predict_files(predictor, find_images(sources, out=out), out, **settings)


def test_every_image_has_results_of_its_own(predictor, photos, tmp_path):
    out = tmp_path / "out"
    outcome = predicted(predictor, [photos], out, confidence=True)
    assert (outcome.predicted, outcome.kept, outcome.failed) == (4, 0, ())
    names = {"a/x": "a/x.jpg", "a/x-2": "a/x.png", "b/x": "b/x.jpg", "b/ü ö": "b/ü ö.bmp"}
    expected = {f"{folder}/{name}{end}" for name in names
                for folder, end in (("labels", ".png"), ("overlays", ".jpg"), ("confidence", ".png"))}  # fmt: skip
    assert files_below(out).keys() == expected | {"areas.csv", "predictions.json"}
    for name, source in names.items():
        result = predictor.predict(photos / source)
        np.testing.assert_array_equal(read_mask(out / "labels" / f"{name}.png"), result.mask)
        grey = np.asarray(Image.open(out / "confidence" / f"{name}.png"))
        np.testing.assert_array_equal(grey, np.rint(result.confidence * 255))
        rows = [row for row in rows_of(out) if row["name"] == name]
        assert {row["image"] for row in rows} == {str(photos / source)}
        assert [(row["class"], int(row["pixels"])) for row in rows] == [(a.name, a.pixels) for a in result.areas()]
        assert sum(float(row["percent"]) for row in rows) == pytest.approx(100, abs=1e-3)


def test_names_stay_when_more_images_come(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predicted(predictor, [photos / "b/x.jpg"], out)
    first = files_below(out / "labels")
    outcome = predicted(predictor, [photos / "a/x.jpg", photos / "b/x.jpg", photos / "b/x.jpg"], out)
    assert (outcome.predicted, outcome.kept) == (1, 1)
    assert files_below(out / "labels").keys() == {"x.png", "x-2.png"}
    assert files_below(out / "labels")["x.png"] == first["x.png"]
    assert {row["image"]: row["name"] for row in rows_of(out)} == {
        str(photos / "b/x.jpg"): "x", str(photos / "a/x.jpg"): "x-2",
    }  # fmt: skip


def test_images_are_not_touched_and_results_are_no_images(predictor, photos):
    (photos / "labels").mkdir()
    Image.fromarray(np.full((40, 50), 3, np.uint8)).save(photos / "labels" / "x.png")  # somebody's own
    before = files_below(photos)
    for overwrite in (False, True, False):
        outcome = predicted(predictor, [photos / "a/x.jpg", photos / "b"], photos, overwrite=overwrite)
        assert len(outcome.failed) == 0
        assert outcome.predicted + outcome.kept == 3
        assert before.items() <= files_below(photos).items()
    assert len(find_images([photos], out=photos)) == 4
    assert (photos / "labels" / "x-2.png").is_file()


def test_patterns_folders_and_nothing(photos, tmp_path):
    def found(*sources):
        return [image.name for image in find_images(sources, out=tmp_path / "out")]

    assert found(photos / "a") == ["x", "x"]
    assert found(str(photos / "**" / "*.jpg")) == ["x", "x"]
    assert found(photos / "a" / "x.jpg", photos) == ["x", "a/x", "b/x", "b/ü ö"]
    (photos / "a::b.jpg").write_bytes(b"")
    assert found(photos / "a::b.jpg") == ["a::b"]
    (photos / "a" / ".hidden.jpg").write_bytes(b"")
    assert found(photos / "a") == ["x", "x"]
    for nothing in (photos / "c", photos / "*.gif", tmp_path / "photos" / "a" / "x.jpeg"):
        with pytest.raises(ValueError, match="there is no image at"):
            found(nothing)


def test_a_call_can_be_repeated(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predicted(predictor, [photos / "a"], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    outcome = predicted(predictor, [photos], out)
    assert (outcome.predicted, outcome.kept) == (2, 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    outcome = predicted(predictor, [photos], out, overwrite=True)
    assert outcome.kept == 0
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


@pytest.fixture
def interrupt(monkeypatch):
    """Call with the arguments of `predicted`: stopped as from the keyboard when the second mask is written."""

    def call(*arguments, **settings):
        save, written = Segmentation.save, []

        def save_one(self, path):
            if written:
                raise KeyboardInterrupt
            written.append(path)
            save(self, path)

        with monkeypatch.context() as patch:
            patch.setattr(Segmentation, "save", save_one)
            with pytest.raises(KeyboardInterrupt):
                predicted(*arguments, **settings)

    return call


@pytest.mark.parametrize(
    "torn",
    ["", "{image},b/x,50,4", "{image},b/x,50,40,cat,17", "{image},b/x,50,40,dog,17,1,1,0\n", "{image},b/\udcc3"],
)
def test_an_interrupted_call_goes_on(predictor, photos, tmp_path, interrupt, torn):
    out, complete = tmp_path / "out", tmp_path / "complete"
    predicted(predictor, [photos], complete)
    interrupt(predictor, [photos], out)
    with (out / "areas.csv").open("a", encoding="utf-8", errors="surrogateescape") as file:  # the last: half of "ü"
        file.write(torn.format(image=photos / "b/x.jpg"))
    (out / "overlays" / "a" / ".x.jpg.7.partial").write_bytes(b"half a file")
    interrupt(predictor, [photos], out)
    outcome = predicted(predictor, [photos], out)
    assert (outcome.predicted, outcome.kept) == (2, 2)
    assert files_below(out) == files_below(complete)


def test_an_interrupted_overwriting_goes_on(predictor, photos, tmp_path, interrupt):
    out = tmp_path / "out"
    predicted(predictor, [photos], out)
    before = files_below(out)
    interrupt(predictor, [photos], out, tags=["cat"], overwrite=True)
    outcome = predicted(predictor, [photos], out, tags=["cat"])
    assert (outcome.predicted, outcome.kept) == (3, 1)
    assert files_below(out).keys() == before.keys()


def test_rows_that_do_not_make_up_an_image_are_dropped(tmp_path):
    table = tmp_path / "areas.csv"
    head = "image,name,width,height,class,pixels,percent,mean_confidence,made_with\n"
    rows = ["/a,a,2,3,cat,5,1,1,0", "/b,b,2,3,background,4,1,1,0", "/b,b,2,3,dog,2,1,1,0", "/b,b,2,3,dog,6,1,1,0"]
    table.write_text(head + "\n".join(rows) + "\n")
    rows = AreaTable(tmp_path).rows
    assert rows.keys() == {"/b"}
    assert [row["class"] for row in rows["/b"]] == ["dog"]  # predicted again


def test_another_network_or_other_tags_need_another_folder(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predicted(predictor, [photos], out)
    before = files_below(out)
    with pytest.raises(ValueError, match="another tags: choose another folder"):
        predicted(predictor, [photos], out, tags=["cat"])
    assert files_below(out) == before
    predicted(predictor, [photos / "a"], out, tags=["cat"], overwrite=True)
    assert {row["class"] for row in rows_of(out)} <= {"background", "cat"}
    kept = {f"{folder}/a/{name}" for folder, name in (("labels", "x.png"), ("labels", "x-2.png"),
            ("overlays", "x.jpg"), ("overlays", "x-2.jpg"))}  # fmt: skip
    assert files_below(out).keys() == kept | {"areas.csv", "predictions.json"}  # b's were of other tags
    for own in ("my,own\n1,2\n", "site,area,owner\n", "notes"):
        (out / "areas.csv").write_text(own)
        with pytest.raises(ValueError, match="not of mcic predict"):
            predicted(predictor, [photos], out, tags=["cat"])
        assert (out / "areas.csv").read_text() == own


def test_changed_tags_of_an_image_predict_it_again(predictor, photos, tmp_path):
    out, paths = tmp_path / "out", [photos / "a" / name for name in ("x.jpg", "x.png")]
    predicted(predictor, paths, out, tags={path: frozenset({"cat"}) for path in paths})
    tags = {paths[0]: frozenset({"dog"}), paths[1]: frozenset({"cat"})}
    outcome = predicted(predictor, paths, out, tags=tags)
    assert (outcome.predicted, outcome.kept) == (1, 1)
    np.testing.assert_array_equal(read_mask(out / "labels" / "x.png"), predictor.predict(paths[0], tags="dog").mask)


def test_what_cannot_be_predicted_again_stays_as_it_was(predictor, photos, tmp_path, caplog):
    out = tmp_path / "out"
    predicted(predictor, [photos], out)
    before = files_below(out)
    (photos / "a" / "x.jpg").write_bytes(b"broken")
    outcome = predicted(predictor, [photos], out, overwrite=True)
    assert (outcome.predicted, outcome.failed) == (3, (photos / "a" / "x.jpg",))
    after = files_below(out)
    assert {name: after[name] for name in before if name != "areas.csv"} == {
        name: before[name] for name in before if name != "areas.csv"
    }
    assert {row["name"] for row in rows_of(out)} == {"a/x", "a/x-2", "b/x", "b/ü ö"}


def test_a_name_that_is_not_utf8_is_passed_over(model, photos, capsys, tmp_path):
    try:
        (photos / "a" / "x.jpg").rename(photos / "a" / "caf\udce9.jpg")
    except OSError:
        pytest.skip("this file system takes no such name")
    status, said, _ = command(capsys, model, photos, "--out", tmp_path / "out")
    assert status == 1
    assert "caf\ufffd.jpg: its name is not UTF-8" in " ".join(said.split())
    assert {row["name"] for row in rows_of(tmp_path / "out")} == {"a/x", "b/x", "b/ü ö"}


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "\x1b[2J"])
def test_a_name_with_a_control_character_is_passed_over(predictor, photos, tmp_path, caplog, name):
    (photos / "a" / "x.jpg").rename(photos / "a" / f"{name}.jpg")
    out = tmp_path / "out"
    for done in (0, 3):
        outcome = predicted(predictor, [photos], out)
        assert (outcome.predicted, outcome.kept, len(outcome.failed)) == (3 - done, done, 1)
    assert {row["name"] for row in rows_of(out)} == {"a/x", "b/x", "b/ü ö"}
    assert "control character" in caplog.text
    assert all(letter.isprintable() for record in caplog.records for letter in record.getMessage())


def test_the_settings_are_those_of_the_masks_that_are_there(predictor, photos, tmp_path):
    """Also where a call with others made none."""
    out = tmp_path / "out"
    predicted(predictor, [photos / "a" / "x.jpg"], out)
    before = files_below(out)
    (photos / "a" / "x.jpg").write_bytes(b"broken")
    outcome = predicted(predictor, [photos / "a" / "x.jpg"], out, tags=["cat"], overwrite=True)
    assert (outcome.predicted, len(outcome.failed)) == (0, 1)
    assert files_below(out) == before


def test_rows_are_on_the_disk_before_the_mask(predictor, photos, tmp_path, monkeypatch):
    out, sizes = tmp_path / "out", set()
    fsync, save = os.fsync, Segmentation.save

    def synced(descriptor):
        fsync(descriptor)
        sizes.add(os.fstat(descriptor).st_size)

    def saved(self, path):
        assert (out / "areas.csv").stat().st_size in sizes
        save(self, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Segmentation, "save", saved)
    assert predicted(predictor, [photos], out).predicted == 4


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()]
)
def test_an_image_that_memory_does_not_hold_is_passed_over(predictor, photos, tmp_path, monkeypatch, caplog, error):
    def fail(images):
        raise error

    monkeypatch.setattr(predictor, "_scores", fail)
    outcome = predicted(predictor, [photos / "b"], tmp_path / "out")
    assert len(outcome.failed) == 2
    assert str(photos / "b" / "x.jpg") in caplog.text
    assert not (tmp_path / "out").exists()
    error = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError, match="a fault"):
        predicted(predictor, [photos / "b"], tmp_path / "out")


def test_settings_are_stored(predictor, photos, tmp_path):
    predicted(predictor, [photos], tmp_path / "out", tags=["dog", "cat"])
    stored = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert stored["settings"]["tags"] == ["cat", "dog"]
    assert stored["mcic"] == mcic.__version__


# Command line


def command(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, and what was printed."""
    status = run("mcic", main, [*map(str, argv), "--device", "cpu"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_exit_status_says_how_it_went(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, _ = command(capsys, model, photos, "--out", out)
    assert (status, "predicted" in said) == (0, True)
    whole = (photos / "a" / "x.jpg").read_bytes()
    (photos / "a" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    status, said, _ = command(capsys, model, photos, "--out", out)
    assert status == 1
    assert "broken.jpg" in said
    assert "there already" in said
    status, said, _ = command(capsys, model, photos / "a" / "broken.jpg", "--out", tmp_path / "none")
    assert status == 2
    assert not (tmp_path / "none").exists()


def test_tags_from_the_command_line(model, photos, tmp_path, capsys):
    status, *_ = command(capsys, model, photos, "--out", tmp_path / "all", "--tags", "dog, cat")
    assert status == 0
    assert {row["class"] for row in rows_of(tmp_path / "all")} <= {"background", "cat", "dog"}
    table = tmp_path / "TAGS.CSV"
    table.write_text("image,tags\nphotos/a/x.jpg,dog\na/x.png,cat\nb/x,\nü ö,ant|cat|dog\n", encoding="utf-8")
    status, *_ = command(capsys, model, photos, "--out", tmp_path / "each", "--tags", table)
    assert status == 0
    seen = {name: {row["class"] for row in rows_of(tmp_path / "each") if row["name"] == name}
            for name in ("a/x", "a/x-2", "b/x", "b/ü ö")}  # fmt: skip
    assert seen["a/x"] <= {"background", "dog"}
    assert seen["a/x-2"] <= {"background", "cat"}
    assert seen["b/x"] == {"background"}
    assert len(seen["b/ü ö"]) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "--out", "{out}"], "no image was given"),
        (["{model}", "{photos}"], "--out"),
        (["{model}", "nothing.jpg", "--out", "{out}"], "there is no image at nothing.jpg"),
        (["{photos}", "{photos}", "--out", "{out}"], "holds no network.json"),
        (["nowhere", "{photos}", "--out", "{out}"], "nowhere is no folder"),
        (["{model}", "{photos}", "--out", "{out}", "--tags", "dgo"], "did you mean 'dog'"),
        (["{model}", "{photos}", "--out", "{out}", "--tags", "no.csv"], "no table of tags"),
        (["{model}", "{photos}", "--out", "{out}", "--tile", "0"], "tile must be"),
        (["{model}", "{photos}", "--out", "{photos}/a/x.jpg"], "x.jpg"),
    ],
)
def test_mistakes_are_one_sentence(model, photos, tmp_path, capsys, arguments, said):
    before = files_below(photos)
    places = {"model": model, "photos": photos, "out": tmp_path / "out"}
    status, _, error = command(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert said in error
    assert error.startswith("mcic: error: ")
    assert error.count("\n") == 1
    assert files_below(photos) == before
    assert not (tmp_path / "out").exists()


def test_a_photograph_that_was_replaced_is_predicted_again(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predicted(predictor, [photos / "a"], out)
    Image.fromarray(photo(80, 90, 9)).save(photos / "a" / "x.jpg")
    outcome = predicted(predictor, [photos / "a"], out)
    assert (outcome.predicted, outcome.kept) == (1, 1)
    assert read_mask(out / "labels" / "x.png").shape == (80, 90)


def test_what_is_asked_for_later_is_written(predictor, photos, tmp_path):
    out = tmp_path / "out"
    predicted(predictor, [photos / "a"], out, overlays=False)
    outcome = predicted(predictor, [photos / "a"], out, confidence=True)
    assert (outcome.predicted, outcome.kept) == (2, 0)
    assert {path.parent.name for path in out.rglob("x.*")} == {"labels", "overlays", "confidence"}
    assert predicted(predictor, [photos / "a"], out, overlays=False).kept == 2


def test_results_in_the_folder_of_photographs_are_no_photographs(predictor, photos):
    assert predicted(predictor, [photos], photos / "first").predicted == 4
    assert predicted(predictor, [photos], photos / "second").predicted == 4


def test_a_name_as_long_as_file_systems_allow(predictor, tmp_path):
    source = tmp_path / ("写真" * 40 + ".jpg")
    Image.fromarray(photo(40, 50)).save(source)
    outcome = predicted(predictor, [source], tmp_path / "out", confidence=True)
    assert outcome.predicted == 1
    assert predicted(predictor, [source], tmp_path / "out", confidence=True).kept == 1


@pytest.mark.parametrize("named", ["X.JPG", "x.jpeg", "a/X.png", "photos/a/x.jpg"])
def test_tables_name_images_as_in_training(photos, tmp_path, named):
    table = tmp_path / "tags.csv"
    table.write_text(f"image,tags\n{named},dog\n")
    images = [image for image in find_images([photos / "a"], out=tmp_path) if image.path.suffix == ".jpg"]
    assert tags_of_images(table, images) == {photos / "a" / "x.jpg": frozenset({"dog"})}


def test_rows_of_a_table_name_no_other_image(photos, tmp_path):
    table = tmp_path / "tags.csv"
    images = [image for image in find_images([photos / "a", photos / "b"], out=tmp_path) if image.name == "x"]
    jpegs = [image for image in images if image.path.suffix == ".jpg"]
    table.write_text("image,tags\na/x.jpg,dog\n")
    with pytest.raises(ValueError, match="has no row for 1 of 2 images"):
        tags_of_images(table, jpegs)
    table.write_text("image,tags\na/X.JPG,dog\nb/X.JPG,cat\n")
    assert tags_of_images(table, jpegs) == {
        photos / "a" / "x.jpg": frozenset({"dog"}), photos / "b" / "x.jpg": frozenset({"cat"}),
    }  # fmt: skip


def test_a_file_that_is_called_like_ours_hides_nothing(predictor, photos, tmp_path):
    (photos / "predictions.json").write_text("[]")
    (photos / "a").rename(photos / "labels")
    assert len(find_images([photos], out=tmp_path / "out")) == 4


def test_rows_of_one_image_add_up_and_rows_of_others_do_not_matter(photos, tmp_path):
    table = tmp_path / "tags.csv"
    (photos / "a" / "x.png").unlink()
    images = find_images([photos / "a", photos / "b"], out=tmp_path)
    images = [image for image in images if image.name == "x"]
    table.write_text("image,tags\na/X.JPG,dog\nA/X,cat\nb/x.jpg,ox\n")
    assert tags_of_images(table, images)[photos / "a" / "x.jpg"] == {"dog", "cat"}
    table.write_text("image,tags\nX.jpg,dog\na/x.jpg,cat\nb/x.jpg,ox\n")
    assert list(tags_of_images(table, images).values()) == [{"cat"}, {"ox"}]
