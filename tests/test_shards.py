"""Sets in tars: what is read, in which order, from where, and that a run on them is as exact as any."""

import copy
import io
import os
import signal
import sys
import tarfile

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
from mcic.data.shard_store import SHARDS_AT_HAND
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


def test_a_torn_tar_keeps_what_is_before_the_tear(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples("a", 6))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    index = index_of(path)
    assert [sample.key for sample in index.samples] == [f"a_{i:03d}" for i in range(len(index.samples))]
    assert 1 <= len(index.samples) < 6
    assert any("cannot be read from" in entry.reason for entry in index.dropped)
    write_shard(path, {"a": {"jpg": scene(0, [1])[0], "cls": "elephant"}})
    path.write_bytes(path.read_bytes().partition(b"elephant")[0] + b"ele")
    assert index_of(path).samples[0].tags is None  # half a name is none
    write_shard(tmp_path / "b.tar", samples("b", 1))
    path.write_bytes(b"no tar" * 500)
    with pytest.raises(ValueError, match=r"a\.tar holds no image"):
        built(tmp_path, tmp_path / "cache")


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


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_tars_never_end_in_anything_but_an_index(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    if not hasattr(test_damaged_tars_never_end_in_anything_but_an_index, "whole"):
        write_shard(path, samples("a", 2))
        test_damaged_tars_never_end_in_anything_but_an_index.whole = path.read_bytes()
    content = bytearray(test_damaged_tars_never_end_in_anything_but_an_index.whole)
    headers = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    index = index_of(path)
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


def test_a_command_that_fails_or_brings_other_content(tmp_path, root, allowed):
    for command, said in ((f"cat {root}/none.tar", "cannot be fetched"), ("false; exit 3", "cannot be fetched")):
        with pytest.raises(ValueError, match=said):
            built(f"pipe:{command}", tmp_path / "cache", val_root=f"{root}/val")
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
    for name in ("webdataset", "webdataset.gopen", "webdataset.shardlists"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("MCIC_ALLOW_PIPE", "1")
    assert len(built(root, tmp_path).train) == 24
    for spec in (piped(root).split("{")[0] + "000.tar", f"{root}/train/train-{{000..003}}.tar", "https://host/x.tar"):
        with pytest.raises(ValueError, match=r"pip install 'mcic\[webdataset\]'"):
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


def test_order_mixes_neighbouring_shards_only(root, tmp_path, allowed):
    data = far(root, tmp_path).train
    orders = np.stack([data.shuffled(np.random.default_rng(seed)) for seed in range(400)])
    assert (np.sort(orders, 1) == np.arange(24)).all()
    first = np.bincount(orders[:, :6].ravel() // 6, minlength=4) / 2400
    np.testing.assert_allclose(first, 0.25, atol=0.05)  # every shard comes first equally often
    assert (orders[:, 1:] // 6 != orders[:, :-1] // 6).mean() > 0.5  # and seldom stays by itself


def test_shards_are_fetched_ahead(root, tmp_path, allowed):
    data = far(root, tmp_path).train
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
