"""Scenes that are held out of training photographs: `python -m bench.scenes`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.scenes import hold_out, scenes_of

ROOT = Path(__file__).parent.parent

GROUNDS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def photographs(generator, each=4):
    """Images of three scenes: a noisy ground of one colour, an object of any colour in the middle."""
    for ground in GROUNDS:
        for _ in range(each):
            image = np.clip(generator.normal(ground, 12, (60, 80, 3)), 0, 255).astype(np.uint8)
            image[20:40, 25:55] = generator.integers(0, 256, 3)
            yield image


def test_scenes_are_told_by_their_borders():
    scenes = scenes_of(list(photographs(np.random.default_rng(0))), number=3)
    assert [len(set(scenes[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(scenes)) == 3


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "photos" / "train"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    rows = ["image,tags"]
    for number, image in enumerate(photographs(np.random.default_rng(0))):
        Image.fromarray(image).save(folder / "images" / f"{number:02}.png")
        Image.fromarray(image[:, :, 0] * 0).save(folder / "masks" / f"{number:02}.png")
        rows.append(f"{number:02}.png,a|b")
    (folder / "tags.csv").write_text("\n".join(rows))
    (folder.parent / "classes.txt").write_text("a\nb\n")
    return folder


def test_whole_scenes_are_held_out(root, tmp_path):
    scenes = {f"{number:02}.png": number // 4 + 1 for number in range(12)}
    out = tmp_path / "out"
    assert hold_out(root, out, [2], scenes) == {"val": 4, "train": 8}
    assert sorted(path.name for path in (out / "val" / "images").iterdir()) == [f"{n:02}.png" for n in range(4, 8)]
    assert len((out / "train" / "tags.csv").read_text().splitlines()) == 9
    assert sorted(path.stem for path in (out / "val" / "masks").iterdir()) == [f"{n:02}" for n in range(4, 8)]
    with pytest.raises(ValueError, match="is there already"):
        hold_out(root, out, [2], scenes)
    with pytest.raises(ValueError, match="must leave images on both sides, got 1, 2, 3"):
        hold_out(root, tmp_path / "other", [1, 2, 3], scenes)
    assert not (tmp_path / "other").exists()


def test_the_command_lists_scenes(root, tmp_path):
    command = [sys.executable, "-m", "bench.scenes", root, tmp_path / "out", "--number", "3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1:3] for line in shown.splitlines()] == [["4", "images"]] * 3
    assert not (tmp_path / "out").exists()
