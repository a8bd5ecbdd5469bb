"""Sets in tars: what is read, in which order, from where, and that a run on them is as exact as any."""

import copy
import io
import os
import signal
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import short
from safetensors.torch import load_file
from shards import CLASSES, encoded, make_shards, samples, write_shard
from trees import make_folder, scene

from mcic.checkpoint import checkpoints
from mcic.cli import run
from mcic.cli.doctor import main as doctor
from mcic.config import DataConfig
from mcic.data import GroundTruth, TrainLoader, build_data, build_saliency
from mcic.data.images import read_image
from mcic.data.shard_index import ShardIndex, index_shard
from mcic.data.shard_store import SHARDS_AT_HAND, ShardStore
from mcic.data.shards import Shards
from mcic.masks import MaskSettings, write_masks
from mcic.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def allowed(monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("MCIC_ALLOW_PIPE", "1")


def piped(root, part="train", count=4):
    return f"pipe:cat {root}/{part}/{part}-{{000..{count - 1:03d}}}.tar"


def built(root, cache, **changes):
    return build_data(DataConfig(name="folder", root=str(root), cache=str(cache), **changes))


def far(root, cache, **changes):
    return built(piped(root), cache, val_root=piped(root, "val", 1), **changes)


def index_of(path):
    with path.open("rb") as file:
        return index_shard(file, name=path.name, stamp="")


def test_images_tags_and_masks_are_those_of_the_samples(root, tmp_path):
    splits = built(root, tmp_path)
    assert (len(splits.train), len(splits.val), splits.train.classes) == (24, 6, CLASSES)
    for index, (key, files) in enumerate(samples("train", 24).items()):
        assert splits.train.ids[index] == key
        np.testing.assert_array_equal(splits.train.tags[index], np.eye(3, dtype=bool)[index % 3])
        np.testing.assert_array_equal(splits.train.mask(index), files["mask.png"])
        np.testing.assert_array_equal(splits.train.image(index), read_image(io.BytesIO(encoded("jpg", files["jpg"]))))
        assert splits.train.size(index) == files["mask.png"].shape


def test_what_webdataset_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pattern = str(tmp_path / "x-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for index in range(8):
            image = encoded("png", scene(index, [1])[0])
            writer.write({"__key__": f"sub/{index}", "png": image, "cls": index % 2, "extra.txt": "of no use"})
    data = built(tmp_path, tmp_path / "cache")
    assert sorted(data.train.ids + data.val.ids) == [f"sub__{index}" for index in range(8)]
    assert data.train.classes == ("0", "1")
    place = data.train.ids.index("sub__2") if "sub__2" in data.train.ids else None
    split, place = (data.train, place) if place is not None else (data.val, data.val.ids.index("sub__2"))
    np.testing.assert_array_equal(split.image(place), scene(2, [1])[0])
    assert split.tags[place].tolist() == [True, False]


@pytest.mark.parametrize(
    "spec",
    [
        "{0}/train",
        "{0}/train/*.tar",
        "{0}/train/train-{{000..003}}.tar",
        "{0}/train/train-00[01].tar::{0}/train/train-{{002,003}}.tar",
        "pipe:cat {0}/train/train-{{000..003}}.tar",
    ],
)
def test_ways_to_name_them(root, tmp_path, allowed, spec):
    ids = built(root, tmp_path).train.ids
    assert built(spec.format(root), tmp_path, val_root=f"{root}/val").train.ids == ids


def test_a_folder_of_images_is_one_whatever_tars_lie_in_it(tmp_path):
    make_folder(tmp_path)
    for part in (tmp_path, tmp_path / "train"):
        write_shard(part / "backup.tar", samples("x", 1))
    assert built(tmp_path, tmp_path / "cache").train.name != "shards"


def test_held_out_shards_stay_on_their_side(tmp_path):
    for number in range(9):
        write_shard(tmp_path / f"{number}.tar", samples(f"s{number}", 2))
    cache = tmp_path / "cache"
    before = built(tmp_path, cache, val_share=0.4)
    assert {name[:2] for name in before.train.ids}.isdisjoint({name[:2] for name in before.val.ids})
    assert len(before.train) + len(before.val) == 18
    assert 0 < len(before.val) < 18
    write_shard(tmp_path / "9.tar", samples("s9", 2))
    after = built(tmp_path, cache, val_share=0.4)
    assert set(before.train.ids) <= set(after.train.ids)
    assert set(before.val.ids) <= set(after.val.ids)


def test_shards_of_one_name_in_several_folders(tmp_path):
    for name in "abc":
        write_shard(tmp_path / name / "0.tar", samples(name, 2))
    data = built(f"{tmp_path}/*/0.tar", tmp_path / "cache")
    assert len(data.train) + len(data.val) == 6
    assert min(len(data.train), len(data.val)) >= 2  # which of the three is held out depends on where they lie


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"json": ["dog", " cat "]}, {"cat", "dog"}),
        ({"json": {"labels": "dog|cat", "caption": "a photo"}}, {"cat", "dog"}),
        ({"json": {"caption": "a photo"}, "cls": "2"}, {"dog"}),
        ({"cls": "dog"}, {"dog"}),
        ({"txt": "dog\ncat\n"}, {"cat", "dog"}),
        ({"json": {"tags": []}, "txt": "dog"}, set()),
    ],
)
def test_tags_in_every_form(tmp_path, files, expected):
    (tmp_path / "classes.txt").write_text("ant\ncat\ndog\n")
    for name in ("a", "b"):
        write_shard(tmp_path / "tars" / f"{name}.tar", {name: {"jpg": scene(0, [1])[0], **files}})
    data = built(tmp_path / "tars", tmp_path / "cache").train
    assert {data.classes[place] for place in np.flatnonzero(data.tags[0])} == expected


def test_saliency_comes_from_the_shard_or_is_computed(tmp_path):
    image, mask = scene(0, [1])
    given = np.where(mask > 0, 200, 10).astype(np.uint8)
    content = {"jpg": image, "cls": "cat"}
    write_shard(tmp_path / "a.tar", {"a": content | {"saliency.png": given}, "b": content})
    write_shard(tmp_path / "b.tar", {"c": content | {"saliency.png": b"none"}})
    data = built(tmp_path, tmp_path / "cache", max_bad_share=0)  # of images: a map is none
    source = build_saliency("auto", cache=str(tmp_path / "cache"))
    found = {}
    for split in (data.train, data.val):
        for index, name in enumerate(split.ids):
            found[name] = source(split, index, split.image(index))
    np.testing.assert_allclose(found["a"], given / 255, atol=1e-6)
    assert found["b"].shape == mask.shape
    assert not np.allclose(found["a"], found["b"], atol=0.1)
    np.testing.assert_array_equal(found["b"], found["c"])


def test_what_is_broken_is_left_out_and_named(tmp_path):
    image, mask = scene(0, [1])
    good = {"jpg": image, "cls": "cat"}
    bad = {
        "garbage": good | {"jpg": b"no image"},
        "cut": good | {"jpg": encoded("jpg", image)[:300]},
        "tags": good | {"json": "{"},
        "odd": good | {"json": {"tags": {"a": [1]}}},
        "long": good | {"txt": "x" * 2**21, "json": {}, "cls": "y" * 2**21},
        "alone": {"cls": "cat"},
        "film": {"mp4": b"", "cls": "cat"},
    }
    fine = {f"fine{i}": good for i in range(20)} | {"small": good | {"mask.png": mask[:9]}, "untagged": {"jpg": image}}
    write_shard(tmp_path / "a.tar", fine | bad)
    write_shard(tmp_path / "b.tar", {"other": good | {"jpg": scene(1, [1])[0]}})
    data = built(tmp_path, tmp_path / "cache", max_bad_share=0.3)
    assert set(data.train.ids + data.val.ids) == {*fine, "other"} - {"untagged"}
    kinds = {entry.name.removeprefix("a.tar/").split(".")[0]: entry.kind for entry in data.train.dropped}
    assert kinds == dict.fromkeys(("garbage", "cut", "tags", "odd", "long"), "broken") | {
        "alone": "kind", "film": "kind", "small": "mask", "untagged": "image"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"5 of 28 images cannot be used.*max-bad-share"):
        built(tmp_path, tmp_path / "cache", max_bad_share=0.1)


def negative(header):
    """The header with a size of -512: what follows it would be itself."""
    header = bytearray(header)
    header[124:136], header[148:156] = b"\xff" * 10 + b"\xfe\x00", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


DAMAGES = {
    "a flipped bit": lambda whole, here: whole[:here] + bytes([whole[here] ^ 1]) + whole[here + 1 :],
    "something else": lambda whole, here: whole[:here] + b"\xaa" * 512 + whole[here + 512 :],
    "cut in a header": lambda whole, here: whole[: here + 200],
    "cut before a header": lambda whole, here: whole[:here],
    "cut in a file": lambda whole, here: whole[: here + 520],
    "a hole": lambda whole, here: whole[:here] + bytes(2**20 + 512),
    "joined": lambda whole, here: whole + whole,
    "a negative size": lambda whole, here: whole[:here] + negative(whole[here : here + 512]) + whole[here + 512 :],
    "empty": lambda whole, here: b"",
    "no tar": lambda whole, here: b"no tar" * 500,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_torn_or_damaged_tar_never_counts_as_a_smaller_set(tmp_path, damage):
    path = write_shard(tmp_path / "a.tar", samples("a", 4))
    write_shard(tmp_path / "b.tar", samples("b", 1))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        here = tar.getmembers()[6].offset  # of the third sample
    path.write_bytes(damage(whole, here))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        with pytest.raises(ValueError, match=r"torn or damaged behind (its start|a_00\d\.\w)"):
            index_of(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ValueError, match=f"the shard {path} is torn or damaged"):
        built(tmp_path, tmp_path / "cache")
    path.write_bytes(whole.rstrip(b"\0") + bytes(1024))  # as short as a tar may end
    assert len(index_of(path).samples) == 4


def test_a_shard_that_came_torn_is_fetched_anew(tmp_path, root, allowed):
    moving = tmp_path / "moving.tar"
    whole = (root / "train" / "train-000.tar").read_bytes()
    moving.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"moving\.tar is torn or damaged"):
        built(f"pipe:cat {moving}", tmp_path / "cache", val_root=f"{root}/val")
    moving.write_bytes(whole)
    assert len(built(f"pipe:cat {moving}", tmp_path / "cache", val_root=f"{root}/val").train) == 6


def test_a_file_that_no_memory_holds_is_left_out(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples("a", 2))
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 2**42
    header = huge.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(512 - len(path.read_bytes().rstrip(b"\0")) % 512) + header)
    try:
        os.truncate(path, path.stat().st_size + 2**42 + 1024)
    except OSError:
        pytest.skip("this file system has no such files")
    index = index_of(path)
    assert len(index.samples) == 2
    assert [(entry.kind, entry.name) for entry in index.dropped] == [("broken", "a.tar/huge.jpg")]


def test_a_tar_reaches_nothing_outside(tmp_path):
    """Names that lead out, links, devices: nothing is unpacked, and nothing but what the tar itself holds is read."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded("jpg", scene(7, [1])[0]))
    before = set(tmp_path.rglob("*"))
    path = tmp_path / "tars" / "a.tar"
    names = ["../../up", "/etc/absolute", "a/../../b", "ü\n\x1b[31m", "x" * 250, "./dot"]
    write_shard(path, {name: {"jpg": scene(0, [1])[0], "cls": "cat"} for name in names})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, str(secret)), ("hard.jpg", tarfile.LNKTYPE, "../secret.jpg"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""), ("null.jpg", tarfile.CHRTYPE, ""), ("folder.jpg", tarfile.DIRTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    write_shard(tmp_path / "tars" / "b.tar", samples("b", 1))
    data = built(path, tmp_path / "cache", val_root=str(tmp_path / "tars" / "b.tar"))
    assert len(data.train) == len(names)
    for index, name in enumerate(data.train.ids):
        assert "/" not in name
        assert name.isprintable()
        assert len(name.encode()) <= 200
        data.train.image(index)
    assert data.train.ids[0] == "..__..__up"
    written = {found for found in tmp_path.rglob("*") if found not in before}
    assert all(found.is_relative_to(tmp_path / "tars") or found.is_relative_to(tmp_path / "cache") for found in written)
    assert not any(found.suffix == ".jpg" for found in written)


@cache
def whole_tar():
    with tempfile.TemporaryDirectory() as folder:
        return write_shard(Path(folder) / "a.tar", samples("a", 2)).read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_tars_never_end_in_anything_but_an_index_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(whole_tar())
    headers = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        index = index_of(path)
    except ValueError as error:
        assert "torn or damaged behind" in str(error)  # noqa: PT017
    else:
        assert len(index.samples) + len(index.dropped) >= 2
        assert ShardIndex.from_json(index.to_json()) == index


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: f"{t}/none-{{0..3}}.tar", "there is no shard"),
        (lambda t: f"{t}/*.tar", "there is no shard"),
        (lambda t: write_shard(t / "a.tar", samples("a", 2)), "single shard"),
        (lambda t: [write_shard(t / f"{n}.tar", samples("a", 2)) for n in "ab"] and t, "'a_000' is in"),
        (lambda t: [write_shard(t / f"{n}.tar", {n: {"jpg": scene(0, [1])[0]}}) for n in "ab"] and t, "has tags"),
        (lambda t: f"pipe:cat {t}/{{a..c}}.tar", "MCIC_ALLOW_PIPE=1"),
        (lambda t: f"PIPE://;cat {t}/{{a..c}}.tar", "MCIC_ALLOW_PIPE=1"),
        (lambda t: f"{t}/a.tar.gz::{t}/b.tar.gz", "there is no shard"),
        (lambda t: [(t / f"{n}.tar.gz").touch() for n in "ab"] and f"{t}/{{a,b}}.tar.gz::", "pipe:gunzip -c"),
    ],
)
def test_what_cannot_be_a_set_is_one_sentence(tmp_path, make, said):
    with pytest.raises(ValueError, match=r".") as caught:
        built(make(tmp_path), tmp_path / "cache")
    assert said in str(caught.value)


def test_masks_with_values_that_are_no_class_are_refused(tmp_path):
    files = {"jpg": scene(0, [1])[0], "cls": "cat", "mask.png": scene(0, [1])[1] * 9}
    write_shard(tmp_path / "a.tar", {"a": files})
    val = write_shard(tmp_path / "val" / "b.tar", samples("b", 1))
    with pytest.raises(ValueError, match="has the value 9: expected 0…2"):
        built(tmp_path / "a.tar", tmp_path / "cache", val_root=str(val))


def test_a_command_that_fails_or_brings_other_content(tmp_path, root, allowed, monkeypatch):
    for command in (f"cat {root}/none.tar", "false; exit 3"):
        with pytest.raises(ValueError, match="cannot be fetched"):
            built(f"pipe:{command}", tmp_path / "cache", val_root=f"{root}/val")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"cannot be fetched: .*gsutil"):
            built("gs://bucket/x.tar", tmp_path / "cache", val_root=f"{root}/val")
    assert not [path for path in (tmp_path / "cache" / "shards" / "fetched").iterdir() if path.suffix != ".lock"]
    moving = tmp_path / "moving.tar"
    moving.write_bytes((root / "train" / "train-000.tar").read_bytes())
    data = built(f"pipe:cat {moving}", tmp_path / "cache", val_root=f"{root}/val").train
    next((tmp_path / "cache" / "shards" / "fetched").glob("*.tar")).unlink()
    data.image(0)
    next((tmp_path / "cache" / "shards" / "fetched").glob("*.tar")).unlink()
    moving.write_bytes((root / "train" / "train-001.tar").read_bytes())
    with pytest.raises(ValueError, match="other content than when it was indexed"):
        data.image(0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file(root, tmp_path, allowed):
    data = far(root, tmp_path).train
    path = data.store._place(0)
    path.unlink()
    path.with_suffix(".partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        data.image(0)
    assert caught.value.filename == str(path.with_suffix(".partial"))
    assert not os.path.lexists(path.with_suffix(".partial"))
    assert data.image(0).ndim == 3  # and once there is room again


def test_another_process_may_remove_what_was_just_there(root, tmp_path, allowed, monkeypatch):
    data = far(root, tmp_path).train
    path = data.store._place(0)
    path.unlink()
    exists = type(path).exists
    monkeypatch.setattr(type(path), "exists", lambda self: self == path or exists(self))
    assert data.image(0).ndim == 3


def test_a_local_tar_that_changes_is_noticed(tmp_path):
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", samples(name, 2))
    data = built(tmp_path, tmp_path / "cache")
    write_shard(tmp_path / "a.tar", samples("a", 3))
    write_shard(tmp_path / "b.tar", samples("b", 3))
    with pytest.raises(ValueError, match="has changed"):
        data.train.image(0)
    assert len(built(tmp_path, tmp_path / "cache").train) == 3  # indexed anew


def test_an_index_is_made_once(root, tmp_path, monkeypatch):
    first = built(root, tmp_path)
    monkeypatch.setattr("mcic.data.shard_store.index_shard", None)
    again = built(root, tmp_path)
    assert again.train.entries == first.train.entries
    damaged = next((tmp_path / "shards" / "index").glob("*.json"))
    damaged.write_text(damaged.read_text()[:-9])
    monkeypatch.undo()
    assert built(root, tmp_path).train.entries == first.train.entries


def test_without_webdataset_local_tars_are_read_and_others_refused(root, tmp_path, monkeypatch):
    for name in ("webdataset", "webdataset.gopen", "braceexpand"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("MCIC_ALLOW_PIPE", "1")
    assert len(built(root, tmp_path).train) == 24
    for spec in (piped(root).split("{")[0] + "000.tar", f"{root}/train/train-{{000..003}}.tar", "https://host/x.tar"):
        with pytest.raises(ValueError, match=r"pip install webdataset"):
            built(spec, tmp_path, val_root=f"{root}/val")


def test_the_doctor_says_that_it_reads_no_tars(root, capsys):
    assert run("mcic", doctor, [str(root)]) == 2
    assert "mcic doctor examines folders of photographs" in capsys.readouterr().err


def loader(data, **changes):
    arguments = {"size": 17, "scale": (0.5, 1.5), "flip": True, "color_jitter": 0.2, "batch_size": 4, "seed": 0,
                 "workers": 0, "targets": GroundTruth()} | changes  # fmt: skip
    return TrainLoader(data, None, **arguments)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "tags", "masks", "indices"))


def test_an_epoch_shows_every_image_once_whoever_loads_it(root, tmp_path, allowed):
    data = far(root, tmp_path).train
    plain = loader(data)
    for epoch in range(3):
        batches = list(plain.epoch(epoch))
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert sorted(indices) == list(range(24))
        for other in (loader(far(root, tmp_path).train, workers=2), loader(data)):
            assert all(map(same, other.epoch(epoch), batches))
        assert all(map(same, plain.epoch(epoch, start=3), batches[3:]))
        halves = [list(loader(data, rank=rank, world_size=2).epoch(epoch)) for rank in (0, 1)]
        for whole, *parts in zip(batches, *halves, strict=True):
            for name in ("images", "tags", "masks", "indices"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    batches = [loader(data, seed=seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(torch.cat([batch.indices for batch in epoch]).tolist()) for epoch in batches}) == 4


def test_fetched_shards_keep_within_their_room(tmp_path, allowed):
    """Thirty shards, room for eight: an epoch fetches each about once, and the disk never holds more."""
    for number in range(30):
        image = np.full((8, 8, 3), number, np.uint8)
        content = {f"{number:02d}_{place}": {"png": image, "cls": "cat"} for place in range(5)}
        path = write_shard(tmp_path / "tars" / f"{number:02d}.tar", content)
    fetches, size = tmp_path / "fetches", path.stat().st_size
    spec = f"pipe:echo x >> {fetches}; cat {tmp_path}/tars/{{00..29}}.tar"
    val = write_shard(tmp_path / "val.tar", {"val": {"png": image, "cls": "cat"}})
    settings = {"val_root": str(val), "val_share": 0.2, "max_bad_share": 0.1, "folder": tmp_path / "store"}
    with pytest.raises(ValueError, match="8 shards at hand"):
        Shards.splits(spec, limit=SHARDS_AT_HAND * size - 1, **settings)
    data = Shards.splits(spec, limit=SHARDS_AT_HAND * size, **settings).train
    assert fetches.read_text().count("x") == 30
    fetched, most = tmp_path / "store" / "fetched", 0
    for epoch in range(3):
        for place in data.shuffled(np.random.default_rng(epoch)):
            assert data.image(place).mean() == place // 5
            most = max(most, len(list(fetched.glob("*.tar"))))
    assert most <= SHARDS_AT_HAND
    assert 30 * 4 - SHARDS_AT_HAND * 3 <= fetches.read_text().count("x") <= 30 * 4
    part = copy.copy(data)
    part.subset(20)
    assert len(part) == 20
    assert len(set(part._shards.tolist())) == 4


def test_only_what_is_fetched_needs_room(tmp_path, allowed):
    """And no more than all of it; what reads in order needs none."""
    sizes = [write_shard(tmp_path / f"{name}.tar", samples(name, 2)).stat().st_size for name in "ab"]
    val = write_shard(tmp_path / "val" / "c.tar", samples("c", 40))
    settings = {"val_root": str(val), "val_share": 0.2, "max_bad_share": 0.1, "folder": tmp_path / "store"}
    assert val.stat().st_size > 2 * max(sizes)
    spec = f"pipe:cat {tmp_path}/{{a,b}}.tar"
    assert len(Shards.splits(spec, limit=2 * max(sizes), **settings).train) == 4
    with pytest.raises(ValueError, match="2 shards at hand"):
        Shards.splits(spec, limit=2 * max(sizes) - 1, **settings)
    assert len(ShardStore([spec.replace("{a,b}", "a")], folder=tmp_path / "store", limit=1).indexes) == 1


def test_order_mixes_neighbouring_shards_only(root, tmp_path, allowed):
    data = far(root, tmp_path).train
    orders = np.stack([data.shuffled(np.random.default_rng(seed)) for seed in range(400)])
    assert (np.sort(orders, 1) == np.arange(24)).all()
    first = np.bincount(orders[:, :6].ravel() // 6, minlength=4) / 2400
    np.testing.assert_allclose(first, 0.25, atol=0.05)  # every shard comes first equally often
    assert (orders[:, 1:] // 6 != orders[:, :-1] // 6).mean() > 0.5  # and seldom stays by itself


def test_shards_are_fetched_ahead(root, tmp_path, allowed, monkeypatch):
    data = far(root, tmp_path).train
    monkeypatch.setattr(np, "unique", None)  # nothing that takes long for a large set, at each step
    fetched = tmp_path / "shards" / "fetched"
    for path in fetched.glob("*.tar"):
        path.unlink()
    data.will_read(np.arange(24))
    data.store._fetching.join()
    assert len(list(fetched.glob("*.tar"))) == 1
    data.will_read(np.arange(24))
    data.store._fetching.join()
    assert len(list(fetched.glob("*.tar"))) == 2
    data.will_read(np.arange(6))
    assert len(list(fetched.glob("*.tar"))) == 2


def config(folder, root, workers=0):
    return short(
        folder, "folder",
        data={"root": piped(root), "val_root": piped(root, "val", 1), "saliency": "auto", "workers": workers,
              "train_images": None, "val_images": None},
        model={"backbone": "tiny", "weights": "none"}, method={"pool_threshold": 0.2, "slots": 8},
        train={"epochs": 2, "size": 33, "precision": "fp32"}, run={"resume": "auto", "checkpoint_every": 1},
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_an_epoch_it_ends_the_same(root, tmp_path, allowed):
    """Twelve steps over fetched shards; killed before the fourth and the ninth, resumed with other loader processes."""
    Trainer(config(tmp_path / "whole", root)).fit()
    for step, workers in ((3, 0), (8, 2), (-1, 0)):
        child = os.fork()
        if not child:
            os.environ["MCIC_DEBUG"] = "1"
            try:
                train_until(config(tmp_path / "killed", root, workers), step)
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if step < 0 else -signal.SIGKILL)
    newest = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed"))
    one, two = (load_file(path / "model.safetensors") for path in newest)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert int(one["memory.counts"].sum()) > 0
    masks = MaskSettings(refine="none", scales=(1.0,), flip=False)
    assert write_masks(tmp_path / "killed", masks)["count"] == 24
    names = {path.stem for path in (tmp_path / "killed" / "masks" / "labels").iterdir()}
    assert names == set(samples("train", 24))


def train_until(config, step):
    """Train; killed before the update of that step."""
    torch.set_num_threads(1)
    trainer = Trainer(config)
    train_step = trainer._train_step

    def step_or_die(batch):
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(batch)

    trainer._train_step = step_or_die
    trainer.fit()
