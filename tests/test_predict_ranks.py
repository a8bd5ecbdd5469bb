"""`mcic predict` over ranks and tars: every image once, whatever dies, and the same bytes as one process writes."""

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards import encoded, write_shard
from trees import scene

import mcic
from mcic import distributed
from mcic.cli import run
from mcic.cli.predict import main
from mcic.predictions import find_images, predict_files

DYING = """
import os, signal, sys, time
from mcic.cli import predict, run
from mcic.segmentation import Segmentation

save, left = Segmentation.save, int(os.environ["DIES_AT"].split(",")[int(os.environ["RANK"])])
SECOND = os.path.join(sys.argv[sys.argv.index("--out") + 1], ".areas-1.csv")

def save_or_die(self, path):
    global left
    left -= 1
    if left == 0:
        end = time.monotonic() + 60
        while os.environ["RANK"] == "0" and not os.path.isfile(SECOND) and time.monotonic() < end:  # slow to start
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
    with open(os.environ["SAVED"], "a") as file:
        print(path.name, file=file)

Segmentation.save = save_or_die
sys.exit(run("mcic", predict.main, sys.argv[1:]))
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(9):
        Image.fromarray(scene(index, [1 + index % 3], size=(40 + index, 56))[0]).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def two_ranks(words, saved, *, dies_at="-1,-1"):
    """The exit status and what was said; a rank dies when it is about to save its n-th mask. `saved` lists them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", DYING, *map(str, words)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DIES_AT": dies_at, "SAVED": str(saved)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_ranks_of_which_one_dies_make_what_one_process_makes(model, photos, tmp_path):
    words = [model, photos, "--out", tmp_path / "two", "--confidence", "--device", "cpu"]
    saved = tmp_path / "saved"
    status, _ = two_ranks(words, saved, dies_at="4,2")
    assert status not in (0, 2)
    masks = {path: path.stat() for path in (tmp_path / "two" / "labels").iterdir()}
    assert 1 <= len(masks) <= 5
    assert (tmp_path / "two" / ".areas-1.csv").is_file()
    status, said = two_ranks(words, saved)
    assert status == 1, said  # one image is broken
    assert sorted(saved.read_text().split()) == [f"{index}.png" for index in range(9)]  # each once
    assert "there already" in said
    assert said.count("warning: passed over") == 1
    for path, facts in masks.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns), "made again"
    predictor = mcic.load(model, device="cpu")
    outcome = predict_files(predictor, find_images([photos], out=tmp_path / "one"), tmp_path / "one", confidence=True)
    assert (outcome.predicted, len(outcome.failed)) == (9, 1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_share_that_was_left_behind_is_taken_over_by_one_process(model, photos, tmp_path):
    """Rows of the second rank count, though nobody put them into the table."""
    predictor, one, two = mcic.load(model, device="cpu"), tmp_path / "one", tmp_path / "two"
    images = find_images([photos], out=one)
    predict_files(predictor, images, one)
    predict_files(predictor, images, two)
    head, *rows = (two / "areas.csv").read_text().splitlines(keepends=True)
    shares = [[row for row in rows if int(row.split(",")[1]) % 2 == rank] for rank in (0, 1)]
    (two / "areas.csv").write_text("".join([head, *shares[0]]))
    (two / ".areas-1.csv").write_text("".join([head, *shares[1], "torn,"]))
    (two / "labels" / "3.png").unlink()
    outcome = predict_files(predictor, images, two)
    assert (outcome.predicted, outcome.kept) == (1, 8)
    assert contents(two) == contents(one)


def test_images_in_tars(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = {f"a/{index}": {"png": scene(index, [1])[0]} for index in range(4)} | {"b": {"jpg": b"no image"}}
    write_shard(tmp_path / "shards" / "x-0.tar", samples)
    out = tmp_path / "out"
    words = [str(model), str(tmp_path / "shards" / "*.tar"), "--out", str(out), "--device", "cpu", "--no-overlays"]
    assert run("mcic", main, words) == 1  # one is broken
    assert sorted(path.relative_to(out).as_posix() for path in out.glob("labels/**/*.png")) == [
        f"labels/a/{index}.png" for index in range(4)
    ]
    expected = mcic.load(model, device="cpu").predict(scene(2, [1])[0]).mask
    with Image.open(out / "labels" / "a" / "2.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), expected)
    before = contents(out)
    assert run("mcic", main, words) == 1
    assert contents(out) == before


def test_a_key_that_comes_twice_is_two_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents = [encoded("png", scene(index, [1])[0]) for index in range(5)]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for key, content in zip(("a", "b", "a", "a-2", "b"), contents, strict=True):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = find_images([path], out=tmp_path / "out")
    assert [image.name for image in images] == ["a", "b", "a-2", "a-2-2", "b-2"]
    assert len({image.path for image in images}) == 5
    for index, image in enumerate(images):
        np.testing.assert_array_equal(image.content(), scene(index, [1])[0])


def test_images_are_the_same_from_every_folder(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MCIC_ALLOW_PIPE", "1")
    tar = write_shard(tmp_path / "x.tar", {"a": {"png": scene(0, [1])[0]}})
    found = []
    for folder, local in ((tmp_path, "x.tar"), (tmp_path / "cache", "../x.tar")):
        monkeypatch.chdir(folder)
        found.append([image.path for image in find_images([local, f"pipe:cat {tar}"], out=tmp_path / "out")])
    assert found[0] == found[1]
    assert found[0][0] == tmp_path / "x.tar" / "a.png"


def test_a_torn_tar_is_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar = write_shard(tmp_path / "x.tar", {str(index): {"png": scene(index, [1])[0]} for index in range(4)})
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert run("mcic", main, [str(model), str(tar), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert f"the shard {tar} is torn or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_first_rank_alone_writes_the_settings(model, photos, tmp_path, monkeypatch):
    predictor, images = mcic.load(model, device="cpu"), find_images([photos], out=tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        (tmp_path / f"{rank}").mkdir()
        assert predict_files(predictor, images, tmp_path / f"{rank}").predicted in (4, 5)
        assert (tmp_path / f"{rank}" / "predictions.json").is_file() == (rank == 0)


def test_ranks_that_found_different_images_write_nothing(model, photos, tmp_path, monkeypatch):
    predictor, images = mcic.load(model, device="cpu"), find_images([photos], out=tmp_path)
    said = []  # by rank 0: of its images, then what their masks are made with
    monkeypatch.setattr(distributed, "from_first", lambda text: said.append(text) or text)
    assert predict_files(predictor, images, tmp_path / "one").predicted == 9
    monkeypatch.setattr(distributed, "from_first", lambda text: said[0])
    for other in (images[1:], [replace(images[0], name="x"), *images[1:]], images[::-1]):
        with pytest.raises(ValueError, match="the ranks found different images"):
            predict_files(predictor, other, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_names_in_a_tar_lead_nowhere_else(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = ["../../up", "/etc/absolute", "a/../b", "a/./b", "new\nline"]
    tar = write_shard(tmp_path / "x.tar", {key: {"png": scene(0, [1])[0]} for key in keys})
    out = tmp_path / "deep" / "out"
    assert run("mcic", main, [str(model), str(tar), "--out", str(out), "--device", "cpu", "--no-overlays"]) == 0
    masks = list(tmp_path.rglob("*.png"))
    assert len(masks) == 5
    assert all(path.parent == out / "labels" and path.name.isprintable() for path in masks)
