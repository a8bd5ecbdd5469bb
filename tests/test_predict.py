"""Prediction: any image, any size, no seam."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from badfiles import odd_exif
from networks import CLASSES, photo
from PIL import Image

import mcic
from mcic import predict, tiles
from mcic.checkpoint import save_network
from mcic.data.images import normalize, read_mask
from mcic.data.palette import voc_palette
from mcic.inference import dense_protocol
from mcic.predict import Predictor
from mcic.segmentation import Segmentation
from mcic.tiles import resized, spans, tiled_protocol


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few hundred pixels; the tiny network looks 52 pixels far, at three quarters of the size 70."""
    monkeypatch.setattr(tiles, "CONTEXT", 72)
    monkeypatch.setattr(tiles, "RAMP", 16)


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
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=odd_exif(6))  # clockwise
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
def test_tiles_of_several_scales_leave_no_seam(model):
    predictor = mcic.load(model, device="cpu", protocol="voc")
    pixels = photo(401, 705)  # 16·25 + 1, 16·44 + 1: the scaled images have their features where the tiles have them
    whole = logits_of(predictor, pixels)
    assert (tiled(predictor, pixels, "voc", limit=330) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.usefixtures("small_tiles")
def test_large_images_are_predicted_in_tiles(model, predictor):
    pixels = photo(411, 702)
    whole = predictor.predict(pixels)
    result = mcic.load(model, device="cpu", tile=330).predict(pixels)
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
def test_images_are_brought_to_the_size_of_training(size, model, predictor, tmp_path):
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


def test_folders_that_hold_no_network(model, tmp_path):
    (tmp_path / "config.yaml").write_text("preset: shapes\n")
    with pytest.raises(ValueError, match="has not finished"):
        mcic.load(tmp_path)
    for broken in ("{", "{}", "[]"):
        (tmp_path / "network.json").write_text(broken)
        with pytest.raises(ValueError, match="cannot be read"):
            mcic.load(tmp_path)
    whole = json.loads((model / "network.json").read_text())
    (tmp_path / "network.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="cannot be read"):
        mcic.load(tmp_path)
    (tmp_path / "network.safetensors").write_bytes((model / "network.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        mcic.load(tmp_path)
    (tmp_path / "network.safetensors").write_bytes((model / "network.safetensors").read_bytes())
    for damage in ({"palette": [[0, 0, 0]]}, {"palette": [[0, 0, 999]] * 4}, {"classes": ["ant"]}, {"long_side": "x"}):
        (tmp_path / "network.json").write_text(json.dumps({**whole, **damage}))
        with pytest.raises(ValueError, match=r"cannot be read|network\.json is damaged"):
            mcic.load(tmp_path)
    del whole["palette"]
    (tmp_path / "network.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="cannot be read: KeyError: 'palette'"):
        mcic.load(tmp_path)


def test_a_run_folder_is_a_model(model, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("network.json", "network.safetensors"):
        (tmp_path / "checkpoints" / name).write_bytes((model / name).read_bytes())
    assert mcic.load(tmp_path, device="cpu").classes == ("background", *CLASSES)


def test_importing_the_package_stays_light():
    code = "import sys, mcic; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)), callable(mcic.load))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[0] == "[] True"


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["single", "voc"])
def test_the_gpu_gives_what_the_cpu_gives(model, monkeypatch, protocol):
    monkeypatch.setattr(tiles, "CONTEXT", 72)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pixels = photo(411, 702)
    expected = mcic.load(model, device="cpu", protocol=protocol).predict(pixels)
    for tile, precision, share in ((1536, "fp32", 0.999), (500, "fp32", 0.98), (1536, "bf16", 0.9)):
        predictor = mcic.load(model, device="cuda", protocol=protocol, tile=tile, precision=precision)
        assert (predictor.predict(pixels).mask == expected.mask).mean() > share
