"""Saliency maps: their quality on a plain scene, the cache, and folders of maps."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from mcic.data import Dataset, build_saliency
from mcic.data import saliency as module
from mcic.data.palette import voc_palette
from mcic.data.saliency import ALGORITHM, geodesic_saliency


class One(Dataset):
    """A single image, with a file or without."""

    name, classes, palette, ids, tags = "one", ("a",), voc_palette(2), ["photo"], np.ones((1, 1), bool)

    def __init__(self, file=None):
        self.file = file

    def image(self, index):
        raise NotImplementedError

    def mask(self, index):
        return None

    def path(self, index):
        return self.file


def disc(height=150, width=200, centre=(70, 90), radius=40):
    """A textured ground with a light gradient, a disc on it, and where the disc is."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    ground = np.stack([60 + columns * 0.3, 110 + rows * 0.2, 70 + columns * 0.1], 2)
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    ground[inside] = (200, 60, 40)
    return (ground + random.normal(0, 6, ground.shape)).clip(0, 255).astype(np.uint8), inside


@pytest.fixture
def computed(monkeypatch):
    """Counts how often a map is really computed."""
    calls = []

    def counting(image):
        calls.append(image.shape)
        return geodesic_saliency(image)

    monkeypatch.setattr(module, "geodesic_saliency", counting)
    return calls


@pytest.mark.parametrize("centre", [(70, 90), (70, 5), (145, 100)], ids=["inside", "cut left", "cut below"])
def test_auto_finds_an_object_also_where_the_border_cuts_it(tmp_path, centre):
    image, inside = disc(centre=centre)
    found = build_saliency("auto", cache=str(tmp_path))(One(), 0, image)
    assert found.shape == inside.shape
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1
    overlap = ((found > 0.5) & inside).sum() / ((found > 0.5) | inside).sum()
    assert overlap > 0.85
    assert found[~inside].mean() < 0.1


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 60, 3), (400, 3, 3), (90, 90, 3)])
def test_nothing_stands_out_of_one_colour(shape):
    found = geodesic_saliency(np.full(shape, 120, np.uint8))
    assert np.isfinite(found).all()
    assert found.max() < 0.5


@pytest.mark.parametrize("shape", [(1, 11, 3), (5, 2, 3), (336, 1, 3)])
def test_images_that_are_all_border_have_a_map(shape):
    """Their distances differ by rounding alone, which no histogram can tell apart."""
    for seed in range(8):
        found = geodesic_saliency(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
        assert 0 <= found.min() <= found.max() <= 1


def test_files_are_cached_on_disk_by_content(tmp_path, computed):
    image, _ = disc()
    source = build_saliency("auto", cache=str(tmp_path))
    first = source(One(tmp_path), 0, image)
    files = list((tmp_path / ALGORITHM).rglob("*.*"))
    assert [file.suffix for file in files] == [".png"]
    again = build_saliency("auto", cache=str(tmp_path))(One(tmp_path), 0, image)
    np.testing.assert_array_equal(first, again)
    assert len(computed) == 1
    source(One(tmp_path), 0, 255 - image)
    assert len(computed) == 2


def test_a_damaged_cache_file_is_made_anew(tmp_path, computed):
    image, _ = disc()
    source = build_saliency("auto", cache=str(tmp_path))
    first = source(One(tmp_path), 0, image)
    (file,) = (tmp_path / ALGORITHM).rglob("*.png")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(source(One(tmp_path), 0, image), first)
    np.testing.assert_array_equal(source(One(tmp_path), 0, image), first)
    assert len(computed) == 2


def test_images_without_a_file_are_kept_in_memory(tmp_path, computed):
    image, _ = disc()
    source = build_saliency("auto", cache=str(tmp_path))
    np.testing.assert_array_equal(source(One(), 0, image), source(One(), 0, image))
    assert len(computed) == 1
    assert not list((tmp_path / ALGORITHM).iterdir())


def test_the_user_cache_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_saliency("auto", cache=None)(One(tmp_path), 0, disc()[0])
    assert len(list((tmp_path / "mcic" / "saliency" / ALGORITHM).rglob("*.png"))) == 1


def test_an_unwritable_cache_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        source = build_saliency("auto", cache=str(tmp_path / "file"))
        maps = [source(One(tmp_path), 0, disc()[0]) for _ in range(2)]
    np.testing.assert_array_equal(*maps)
    assert len(caplog.records) == 1
    assert "--data.cache" in caplog.text


def test_a_cache_that_fills_up_is_one_warning_and_no_rubbish(tmp_path, caplog, monkeypatch):
    source = build_saliency("auto", cache=str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            source(One(tmp_path), 0, disc()[0])
    assert len(caplog.records) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_none_and_unknown_words(tmp_path):
    assert build_saliency("none", cache=None) is None
    with pytest.raises(ValueError, match=r"--data.saliency must be auto, none or a folder.*did you mean 'auto'"):
        build_saliency("autp", cache=None)


@pytest.mark.parametrize("kind", ["8 bit", "16 bit", "jpg"])
def test_a_folder_of_maps(tmp_path, kind):
    values = np.tile(np.linspace(0, 1, 50, dtype=np.float32), (30, 1))
    if kind == "16 bit":
        Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "photo.png")
    else:
        name = "photo.jpg" if kind == "jpg" else "photo.png"
        Image.fromarray((values * 255).astype(np.uint8)).save(tmp_path / name, quality=100)
    source = build_saliency(str(tmp_path), cache=None)
    same = source(One(), 0, np.zeros((30, 50, 3), np.uint8))
    np.testing.assert_allclose(same, values, atol=0.02)
    larger = source(One(), 0, np.zeros((60, 100, 3), np.uint8))
    assert larger.shape == (60, 100)
    np.testing.assert_allclose(larger[::2, ::2], values, atol=0.03)


def test_a_missing_map_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"lacks image photo: expected photo.png or photo.jpg"):
        build_saliency(str(tmp_path), cache=None)(One(), 0, np.zeros((3, 3, 3), np.uint8))
