"""Prediction: any image, any size, no seam; files in, files out, and nothing of the user's is touched."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mcic
from mcic import predict, tiles
from mcic.areas import AreaTable
from mcic.checkpoint import save_network
from mcic.cli import run
from mcic.cli.predict import main
from mcic.data.images import normalize, read_mask
from mcic.data.palette import voc_palette
from mcic.inference import dense_protocol
from mcic.model import NetworkSpec, SegmentationNetwork
from mcic.predict import Predictor
from mcic.predictions import find_images, predict_files
from mcic.segmentation import Segmentation
from mcic.tiles import resized, spans, tiled_protocol

CLASSES = ("ant", "cat", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported network with random weights, whose scores differ from place to place."""
    torch.manual_seed(3)
    network = SegmentationNetwork(NetworkSpec("tiny", None, "linear", len(CLASSES) + 1)).eval()
    with torch.no_grad():
        scores = network(torch.randn(1, 3, 97, 97))
        network.segmentation_head.bias -= scores.mean((0, 2, 3))
    path = tmp_path_factory.mktemp("model")
    save_network(path, network, classes=CLASSES, palette=voc_palette(4).tolist())
    return path


@pytest.fixture(scope="module")
def predictor(folder):
    return mcic.load(folder, device="cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few hundred pixels; the tiny network looks 52 pixels far, at three quarters of the size 70."""
    monkeypatch.setattr(tiles, "CONTEXT", 72)
    monkeypatch.setattr(tiles, "RAMP", 16)


def photo(height=60, width=75, seed=0) -> np.ndarray:
    """uint8 [H, W, 3]: colours that change slowly, with a little noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth // 2 + random.integers(0, 60, smooth.shape)).astype(np.uint8)


def logits_of(predictor, pixels: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return dense_protocol(predictor.network, normalize(pixels)[None], 4, predictor.protocol)[0]


def test_mask_and_confidence_are_those_of_the_network(predictor):
    pixels = photo()
    result = predictor.predict(pixels, probabilities=True)
    expected = logits_of(predictor, pixels).softmax(0).numpy()
    np.testing.assert_array_equal(result.mask, expected.argmax(0))
    np.testing.assert_allclose(result.confidence, expected.max(0), atol=1e-5)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    assert result.mask.dtype == np.uint8
    assert len(np.unique(result.mask)) > 1
    assert result.classes == ("background", *CLASSES)


def test_every_kind_of_image_is_the_same_image(predictor, tmp_path):
    pixels = photo()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    with Image.open(tmp_path / "turned.png") as opened:
        kinds = [pixels, tmp_path / "a.png", str(tmp_path / "turned.png"), opened, planes, planes / 255]
        results = [predictor.predict(kind) for kind in kinds]
    for result in results:
        np.testing.assert_array_equal(result.pixels, pixels)
        np.testing.assert_array_equal(result.mask, results[0].mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3), (33, 34)])
def test_tiny_images(predictor, size):
    assert predictor.predict(photo(*size)).mask.shape == size


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4), np.uint8), "uint8 [4, 4]"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (torch.zeros(4, 4, 3), "[3, H, W]"),
        (torch.full((3, 4, 4), -1.0), "not normalised"),
        (torch.full((3, 4, 4), torch.nan), "not normalised"),
        (7, "got int"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_what_is_no_image_is_refused(predictor, image, said):
    with pytest.raises(ValueError, match=r".") as caught:
        predictor.predict(image)
    assert said in str(caught.value)


def test_tags_restrict_the_classes(predictor):
    pixels = photo()
    free = predictor.predict(pixels)
    assert set(np.unique(free.mask)) - {0, 2}
    result = predictor.predict(pixels, tags=["cat"], probabilities=True)
    assert set(np.unique(result.mask)) <= {0, 2}
    scores = logits_of(predictor, pixels)[[0, 2]].softmax(0).numpy()
    np.testing.assert_allclose(result.probabilities[[0, 2]], scores, atol=1e-5)
    assert not result.probabilities[[1, 3]].any()
    np.testing.assert_array_equal(predictor.predict(pixels, tags="cat").mask, result.mask)
    assert not predictor.predict(pixels, tags=[]).mask.any()
    with pytest.raises(ValueError, match="did you mean 'cat'"):
        predictor.predict(pixels, tags=["catt"])


def test_batches_and_streams_give_what_single_images_give(predictor):
    images = [photo(40, 50, 0), photo(30, 50, 1), photo(40, 50, 2), photo(40, 50, 3)]
    single = [predictor.predict(image) for image in images]
    for results in (predictor.predict_batch(images), predictor.predict_stream(images),
                    predictor.predict_stream(iter(images), batch_pixels=4000)):  # fmt: skip
        for result, expected, image in zip(results, single, images, strict=True):
            np.testing.assert_array_equal(result.pixels, image)
            assert (result.mask == expected.mask).mean() > 0.999
            np.testing.assert_allclose(result.confidence, expected.confidence, atol=1e-4)


def test_small_images_share_a_batch_by_what_the_network_sees(predictor, monkeypatch):
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 64 * 64)
    larger = Predictor(predictor.network, classes=CLASSES, palette=predictor.palette, device="cpu", long_side=64)
    seen, segment = [], larger._segment
    monkeypatch.setattr(larger, "_segment", lambda images, *rest: seen.append(len(images)) or segment(images, *rest))
    assert len(larger.predict_batch([photo(16, 16, number) for number in range(7)])) == 7
    assert seen == [3, 3, 1]


def test_a_stream_takes_no_more_than_it_needs(predictor):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield photo(20, 20, number)

    next(predictor.predict_stream(endless()))
    assert len(taken) == 1
    taken.clear()
    next(predictor.predict_stream(endless(), batch_pixels=1200))
    assert len(taken) == 3


@pytest.mark.parametrize("unit", [4, 16, 64, 128])
@pytest.mark.parametrize("limit", [1, 900, 1536, 2000])
def test_tiles_cover_an_axis_once(unit, limit):
    for length in [1, 899, 900, 901, 1537, 1800, 2049, 3001, 10_000, 29_999]:
        parts = spans(length, limit=limit, unit=unit)
        total = torch.zeros(length)
        for part in parts:
            total[part.begin : part.end] += part.weights(torch.device("cpu"))
            assert part.start % unit == 0
            assert part.start <= part.begin < part.fade <= part.end <= part.stop <= length
            assert part.begin == 0 or part.begin - part.start >= tiles.CONTEXT
            assert part.end == length or part.stop - part.end >= tiles.CONTEXT
            if len(parts) > 1:  # a least size has room for the overlap
                assert part.stop - part.start <= max(limit, 1 + 2 * -(-(2 * tiles.CONTEXT + tiles.RAMP) // unit) * unit)
        torch.testing.assert_close(total, torch.ones(length))
        settled = [(part.begin, part.fade) for part in parts]
        assert settled[0][0] == 0
        assert settled[-1][1] == length
        assert all(left[1] == right[0] for left, right in itertools.pairwise(settled))


def tiled(predictor, pixels: np.ndarray, protocol: str, limit: int) -> torch.Tensor:
    """The logits put together from tiles, NaN where none came."""
    logits = torch.full((4, *pixels.shape[:2]), torch.nan)
    parts = tiled_protocol(
        predictor.network, normalize(pixels), 4, protocol, limit=limit, prepare=lambda piece: piece[None]
    )
    count = 0
    with torch.no_grad():
        for rows, columns, scores in parts:
            logits[:, rows, columns] = scores
            count += 1
    assert count > 4
    return logits


@pytest.mark.usefixtures("small_tiles")
def test_tiles_leave_no_seam(predictor, monkeypatch):
    pixels = photo(411, 702)
    whole = logits_of(predictor, pixels)
    logits = tiled(predictor, pixels, "single", limit=330)
    assert (logits - whole).abs().max() < 1e-5 * whole.abs().max()
    monkeypatch.setattr(tiles, "CONTEXT", 8)  # less than the network sees
    seams = tiled(predictor, pixels, "single", limit=330)
    assert (seams - whole).abs().max() > 1e-2


@pytest.mark.usefixtures("small_tiles")
def test_tiles_of_several_scales_leave_no_seam(folder):
    predictor = mcic.load(folder, device="cpu", protocol="voc")
    pixels = photo(401, 705)  # 16·25 + 1, 16·44 + 1: the scaled images have their features where the tiles have them
    whole = logits_of(predictor, pixels)
    assert (tiled(predictor, pixels, "voc", limit=330) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.usefixtures("small_tiles")
def test_large_images_are_predicted_in_tiles(folder, predictor):
    pixels = photo(411, 702)
    whole = predictor.predict(pixels)
    result = mcic.load(folder, device="cpu", tile=330).predict(pixels)
    assert (result.mask == whole.mask).mean() > 0.9999
    np.testing.assert_allclose(result.confidence, whole.confidence, atol=1e-4)


def test_where_there_are_fewer_pixels_all_scores_count():
    ((rows, small),) = resized(torch.arange(64.0).view(1, 8, 8), (2, 2))
    assert rows == slice(0, 2)
    torch.testing.assert_close(small.mean(), torch.tensor(31.5))
    one_hot = torch.zeros(1, 8, 8)
    one_hot[0, 0, 3] = 1
    assert next(resized(one_hot, (2, 2)))[1].sum() > 0.01


@pytest.mark.parametrize("size", [(50, 70), (23, 200), (7, 9), (6, 6)])
def test_resizing_in_bands_is_interpolation(size, monkeypatch):
    monkeypatch.setattr(tiles, "_BAND_VALUES", 3 * 70 * 4)
    scores = torch.randn(3, 6, 6)
    bands = list(resized(scores, size))
    expected = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), expected)
    assert [rows.start for rows, _ in bands] == [0, *(rows.stop for rows, _ in bands[:-1])]


@pytest.mark.parametrize("size", [(45, 64), (180, 256)])
def test_images_are_brought_to_the_size_of_training(size, folder, predictor, tmp_path):
    save_network(tmp_path, predictor.network, classes=CLASSES, palette=voc_palette(4).tolist(), long_side=size[1])
    pixels = photo(90, 128)
    result = mcic.load(tmp_path, device="cpu").predict(pixels)
    seen = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    scores = F.interpolate(logits_of(predictor, seen)[None], size=(90, 128), mode="bilinear", antialias=True)[0]
    assert (result.mask == scores.argmax(0).numpy()).mean() > 0.999
    assert result.pixels.shape == pixels.shape
    unchanged = mcic.load(tmp_path, device="cpu", long_side=0).predict(pixels)
    np.testing.assert_array_equal(unchanged.mask, predictor.predict(pixels).mask)
    assert (unchanged.mask != result.mask).any()


def test_areas_overlay_and_mask_file(tmp_path):
    mask = np.zeros((600, 900), np.uint8)  # more rows than are counted at once
    mask[100:550, 200:300] = 2
    confidence = np.where(mask == 2, 0.75, 0.5).astype(np.float32)
    palette = voc_palette(4)
    result = Segmentation(mask, confidence, ("background", *CLASSES), palette, photo(600, 900))
    areas = {area.name: area for area in result.areas()}
    assert areas.keys() == {"background", "cat"}
    assert (areas["cat"].pixels, areas["cat"].percent, areas["cat"].mean_confidence) == (45000, 45000 / 5400, 0.75)
    assert areas["background"].mean_confidence == pytest.approx(0.5)
    assert result.overlay().shape == (600, 900, 3)
    assert result.overlay(max_side=300).shape == (200, 300, 3)
    np.testing.assert_array_equal(result.overlay()[0, 0], result.pixels[0, 0])  # background shows the image
    np.testing.assert_array_equal(result.overlay()[100, 250], palette[2])  # the outline
    legend = result.overlay(legend=True)
    assert (legend[600:] == palette[2]).all(2).any()
    assert not (legend[600:] == palette[1]).all(2).any()
    result.save(tmp_path / "deep" / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep" / "mask.png"), mask)
    with Image.open(tmp_path / "deep" / "mask.png") as image:
        assert image.convert("RGB").getpixel((250, 300)) == tuple(palette[2])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mask.png"]


# Files


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


def test_a_name_that_is_not_utf8_is_passed_over(folder, photos, capsys, tmp_path):
    try:
        (photos / "a" / "x.jpg").rename(photos / "a" / "caf\udce9.jpg")
    except OSError:
        pytest.skip("this file system takes no such name")
    status, said, _ = command(capsys, folder, photos, "--out", tmp_path / "out")
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


# Command line


def command(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, and what was printed."""
    status = run("mcic", main, [*map(str, argv), "--device", "cpu"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_exit_status_says_how_it_went(folder, photos, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, _ = command(capsys, folder, photos, "--out", out)
    assert (status, "predicted" in said) == (0, True)
    whole = (photos / "a" / "x.jpg").read_bytes()
    (photos / "a" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    status, said, _ = command(capsys, folder, photos, "--out", out)
    assert status == 1
    assert "broken.jpg" in said
    assert "there already" in said
    status, said, _ = command(capsys, folder, photos / "a" / "broken.jpg", "--out", tmp_path / "none")
    assert status == 2
    assert not (tmp_path / "none").exists()


def test_tags_from_the_command_line(folder, photos, tmp_path, capsys):
    status, *_ = command(capsys, folder, photos, "--out", tmp_path / "all", "--tags", "dog, cat")
    assert status == 0
    assert {row["class"] for row in rows_of(tmp_path / "all")} <= {"background", "cat", "dog"}
    table = tmp_path / "tags.csv"
    table.write_text("image,tags\nphotos/a/x.jpg,dog\na/x.png,cat\nb/x,\nü ö,ant|cat|dog\n", encoding="utf-8")
    status, *_ = command(capsys, folder, photos, "--out", tmp_path / "each", "--tags", table)
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
def test_mistakes_are_one_sentence(folder, photos, tmp_path, capsys, arguments, said):
    before = files_below(photos)
    places = {"model": folder, "photos": photos, "out": tmp_path / "out"}
    status, _, error = command(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert said in error
    assert error.startswith("mcic: error: ")
    assert error.count("\n") == 1
    assert files_below(photos) == before
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_network(folder, tmp_path):
    (tmp_path / "config.yaml").write_text("preset: shapes\n")
    with pytest.raises(ValueError, match="has not finished"):
        mcic.load(tmp_path)
    for broken in ("{", "{}", "[]"):
        (tmp_path / "network.json").write_text(broken)
        with pytest.raises(ValueError, match="cannot be read"):
            mcic.load(tmp_path)
    whole = json.loads((folder / "network.json").read_text())
    (tmp_path / "network.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="cannot be read"):
        mcic.load(tmp_path)
    (tmp_path / "network.safetensors").write_bytes((folder / "network.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        mcic.load(tmp_path)
    (tmp_path / "network.safetensors").write_bytes((folder / "network.safetensors").read_bytes())
    for damage in ({"palette": [[0, 0, 0]]}, {"palette": [[0, 0, 999]] * 4}, {"classes": ["ant"]}, {"long_side": "x"}):
        (tmp_path / "network.json").write_text(json.dumps({**whole, **damage}))
        with pytest.raises(ValueError, match=r"cannot be read|network\.json is damaged"):
            mcic.load(tmp_path)
    del whole["palette"]
    (tmp_path / "network.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="cannot be read: KeyError: 'palette'"):
        mcic.load(tmp_path)


def test_a_run_folder_is_a_model(folder, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("network.json", "network.safetensors"):
        (tmp_path / "checkpoints" / name).write_bytes((folder / name).read_bytes())
    assert mcic.load(tmp_path, device="cpu").classes == ("background", *CLASSES)


def test_importing_the_package_stays_light():
    code = "import sys, mcic; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)), callable(mcic.load))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[0] == "[] True"


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["single", "voc"])
def test_the_gpu_gives_what_the_cpu_gives(folder, monkeypatch, protocol):
    monkeypatch.setattr(tiles, "CONTEXT", 72)
    pixels = photo(411, 702)
    expected = mcic.load(folder, device="cpu", protocol=protocol).predict(pixels)
    for tile, precision, share in ((1536, "fp32", 0.999), (500, "fp32", 0.98), (1536, "bf16", 0.9)):
        predictor = mcic.load(folder, device="cuda", protocol=protocol, tile=tile, precision=precision)
        assert (predictor.predict(pixels).mask == expected.mask).mean() > share


def test_settings_are_stored(predictor, photos, tmp_path):
    predicted(predictor, [photos], tmp_path / "out", tags=["dog", "cat"])
    stored = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert stored["settings"]["tags"] == ["cat", "dog"]
    assert stored["mcic"] == mcic.__version__
