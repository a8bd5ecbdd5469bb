"""Exported networks give what the network gives, need nothing but their file, and say what they are."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import short

import mcic
from mcic import export
from mcic.checkpoint import load_network, save_network, used_ground_truth
from mcic.cli import run
from mcic.cli.export import main
from mcic.config_io import save_config
from mcic.data.images import normalize
from mcic.data.palette import voc_palette
from mcic.export import DeployedNetwork, compare, export_network
from mcic.inference import dense
from mcic.model import NetworkSpec, SegmentationNetwork

CLASSES = ("striped", "dotted", "checked", "ringed", "waved", "crossed")
SIZES = [(1, 40, 56), (2, 33, 33), (1, 32, 33), (3, 17, 90), (1, 2, 2), (1, 2, 61)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder as training leaves it, with random weights."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("runs") / "run"
    network = SegmentationNetwork(NetworkSpec("tiny", None, "linear", 7))
    network.train()(torch.randn(4, 3, 65, 65))  # the norms' statistics are no longer those of the start
    save_network(folder / "checkpoints", network, classes=CLASSES, palette=voc_palette(7).tolist())
    save_config(short(folder).resolved(), folder / "config.yaml")
    summary = {
        "val/miou": 73.04, "train/mask_miou_cam": 60.4, "per_class": {"val": [90.0, None, 51.5, 1, 2, 3, 4]},
        "protocol": "single", "supervision": "tags", "ground_truth_used": False,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def exported(finished) -> Path:
    """All formats that can be written here."""
    out = finished.parent / "out" / "network"
    export_network(finished, out)
    return out


def images_of(size: tuple[int, int, int]) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)


def expected_of(folder: Path, images: np.ndarray) -> torch.Tensor:
    network, _ = load_network(folder)
    with torch.no_grad():
        return dense(network, torch.stack([normalize(image) for image in images]), network.stride)


@pytest.fixture(scope="module")
def program(exported):
    return torch.export.load(exported / "network.pt2").module()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_program_takes_any_batch_and_size(exported, program, size):
    images = images_of(size)
    logits, mask = program(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    expected = expected_of(exported, images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), logits.argmax(1))


@pytest.mark.parametrize("size", [*SIZES, (1, 1, 1)], ids=str)
def test_the_onnx_model_needs_nothing_but_its_file(exported, size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    shutil.copy(exported / "network.onnx", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["logits", "mask"]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["background", *CLASSES]
    images = images_of(size)
    logits, mask = session.run(None, {"images": images.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    np.testing.assert_allclose(logits, expected_of(exported, images).numpy(), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(mask, logits.argmax(1))


def test_mcic_reads_its_export(exported, finished):
    image = images_of((1, 50, 70))[0]
    result = mcic.load(exported, device="cpu").predict(image)
    np.testing.assert_array_equal(result.mask, mcic.load(finished, device="cpu").predict(image).mask)
    assert result.classes == ("background", *CLASSES)


def test_what_was_compared_is_stored(exported):
    description = json.loads((exported / "network.json").read_text())
    assert {check["format"] for check in description["checks"]} >= {"safetensors", "torch"}
    for check in description["checks"]:
        assert 0 <= check["max_difference"] < 1e-4
        assert check["equal_labels"] > 99.9
        assert check["images"] > 4
        assert (exported / check["file"]).is_file()
    assert description["contract"]["input"]["range"] == [0, 1]
    assert description["contract"]["outside"] == "nothing"


def test_the_card_says_what_it_is(exported):
    card = (exported / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "image-segmentation"
    for said in ("image-level tags only", "| Ground truth used | no, for measuring only |", "| Network alone | 73.0 |",
                 "| 2 | dotted | `#008000` | 51.5 |", "| 1 | striped | `#800000` | – |", "`single`", "network.pt2",
                 "procedural shapes"):  # fmt: skip
        assert said in text, said
    assert "None" not in text


def test_the_card_owns_up_to_ground_truth(finished, exported, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    summary = json.loads((run_folder / "summary.json").read_text())
    (run_folder / "summary.json").write_text(json.dumps({**summary, "ground_truth_used": True}))
    export_network(run_folder, tmp_path / "out", formats=["safetensors"])
    assert "| Ground truth used | yes" in (tmp_path / "out" / "README.md").read_text()
    Image.fromarray(images_of((1, 40, 50))[0]).save(tmp_path / "a.png")
    export_network(exported, tmp_path / "again", formats=["safetensors"], images=[tmp_path / "a.png"])
    assert "exported without its run" in (tmp_path / "again" / "README.md").read_text()


def test_a_file_that_differs_is_not_written(finished, tmp_path, monkeypatch):
    def slightly_off(path):
        network = DeployedNetwork(load_network(path.parent)[0])
        return lambda images: (network(images)[0] + 0.1, network(images)[1])

    monkeypatch.setitem(export._READERS, "safetensors", slightly_off)
    with pytest.raises(ValueError, match="does not give what the network gives"):
        export_network(finished, tmp_path / "out", formats=["safetensors"])
    assert list(tmp_path.rglob("*")) == []


class TestComparison:
    """`compare` with a network that is what it should be but for one thing."""

    @pytest.fixture
    def network(self, finished):
        return load_network(finished / "checkpoints")[0]

    def check(self, network, change, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        deployed = DeployedNetwork(network)
        return compare(network, lambda images: change(*deployed(images)), [images_of((2, 40, 50))], name="torch",
                       path=tmp_path / "file")  # fmt: skip

    def test_passes_as_it_is(self, network, tmp_path):
        check = self.check(network, lambda logits, mask: (logits, mask), tmp_path)
        assert check.images == 2
        assert check.equal_labels == 100

    @pytest.mark.parametrize("spoil", [
        lambda logits, mask: (logits + 0.1, mask),
        lambda logits, mask: (logits.masked_fill(logits == logits.max(), torch.nan), mask),
        lambda logits, mask: (logits, (mask + (torch.arange(50) == 7)) % 7),
    ], ids=["offset", "nan", "labels"])  # fmt: skip
    def test_refuses(self, network, spoil, tmp_path):
        with pytest.raises(ValueError, match="does not give"):
            self.check(network, spoil, tmp_path)


def test_nothing_is_replaced_unasked(finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"has README\.md already"):
        export_network(finished, out, formats=["safetensors"])
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "README.md"]
    with pytest.raises(ValueError, match=r"no network\.json that says they are an earlier export"):
        export_network(finished, out, formats=["safetensors"], overwrite=True)
    (out / "README.md").rename(out / "network.onnx")  # of a format that is not asked for
    with pytest.raises(ValueError, match=r"has network\.onnx already"):
        export_network(finished, out, formats=["safetensors"])
    assert (out / "network.onnx").read_text() == "mine"


def test_an_earlier_export_is_replaced_on_request(finished, tmp_path):
    out = tmp_path / "out"
    export_network(finished, out, formats=["safetensors"])
    (out / "network.onnx").write_text("of an earlier network")
    (out / "notes.txt").write_text("mine")
    export_network(finished, out, formats=["safetensors"], overwrite=True)
    assert {path.name for path in out.iterdir()} == {"README.md", "network.json", "network.safetensors", "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1\n"), ("config.yaml", "- 1\n"), ("config.yaml", "data:\n"), ("summary.json", "[]"),
        ("summary.json", "{"), ("checkpoints/network.json", None),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_before_the_work(finished, tmp_path, capsys, monkeypatch, name, content):
    shutil.copytree(finished, tmp_path / "run")
    if content is None:
        card = json.loads((finished / name).read_text())
        del card["palette"]
        content = json.dumps(card)
    (tmp_path / "run" / name).write_text(content)
    Image.fromarray(images_of((1, 40, 50))[0]).save(tmp_path / "a.png")
    monkeypatch.setattr(export, "_write", None)
    status, _, error = command(capsys, tmp_path / "run", "--out", tmp_path / "out", "--images", tmp_path / "a.png")
    assert status == 2
    assert Path(name).parent.name in error
    assert "palette" in error or Path(name).name in error
    assert error.count("\n") == 1


def test_the_card_takes_a_summary_of_other_classes(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"per_class": {"val": [1]}, "val/miou": "?"}')
    export_network(tmp_path / "run", tmp_path / "out", formats=["safetensors"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 2 | dotted | `#008000` | – |" in card
    assert "Not measured" in card


def test_out_must_be_a_folder_before_the_work(finished, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(export, "_write", None)
    with pytest.raises(ValueError, match="--out must be a folder"):
        export_network(finished, tmp_path / "out", formats=["safetensors"])


def test_without_onnx(finished, tmp_path, monkeypatch, caplog):
    found = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ValueError, match="needs onnxruntime: pip install onnxruntime"):
        export_network(finished, tmp_path / "out", formats=["onnx"])
    with caplog.at_level(logging.INFO, "mcic"):
        assert export._formats(None) == ["safetensors", "torch"]
    assert "pip install onnxruntime" in caplog.text


@pytest.mark.parametrize(("name", "head"), [("efficientnet_lite0", "lfov"), ("vgg16", "linear"), ("resnet50", "aspp")])
def test_the_graph_of_other_backbones_gives_what_they_give(name, head):
    """Without export, which takes long for them: the graph is the same code for all."""
    network = SegmentationNetwork(NetworkSpec(name, None, head, 3)).eval()
    images = images_of((1, 45, 70))
    with torch.no_grad():
        logits, mask = DeployedNetwork(network)(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        expected = dense(network, normalize(images[0])[None], network.stride)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert mask.shape == (1, 45, 70)


def command(capsys, *argv) -> tuple[int, str, str]:
    status = run("mcic", main, [*map(str, argv)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command_line(finished, tmp_path, capsys):
    Image.fromarray(images_of((1, 40, 50))[0]).save(tmp_path / "a.png")
    out = tmp_path / "out"
    status, said, _ = command(
        capsys, finished, "--out", out, "--formats", "safetensors", "--images", tmp_path / "a.png"
    )
    assert status == 0
    assert "on 4 images" in said  # the image, a piece of it alone and twice
    assert "network.safetensors" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--out", "{out}"], "nowhere is no folder"),
        (["{tmp}", "--out", "{out}"], "holds no network.json"),
        (["{run}"], "--out"),
        (["{run}", "--out", "{out}", "--formats", "tflite"], "tflite"),
        (["{run}/checkpoints", "--out", "{out}"], "give some with --images"),
        (["{run}", "--out", "{out}", "--images", "no.jpg"], "no such file"),
        (["{run}", "--out", "{run}/config.yaml", "--formats", "safetensors"], "config.yaml"),
    ],
)
def test_mistakes_are_one_sentence(finished, tmp_path, capsys, arguments, said):
    places = {"run": finished, "tmp": tmp_path, "out": tmp_path / "out"}
    status, _, error = command(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert not list(finished.glob(".*.partial"))


def test_out_may_be_a_link_or_the_present_folder(finished, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export_network(finished, tmp_path / "link", formats=["safetensors"])
    assert (tmp_path / "link").is_symlink()
    files = {"README.md", "network.json", "network.safetensors"}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == files
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_network(finished, Path("."), formats=["safetensors"])
    assert {path.name for path in (tmp_path / "here").iterdir()} == files


def test_ground_truth_goes_with_the_network(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    card = run_folder / "checkpoints" / "network.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "ground_truth_used": True}))
    export_network(run_folder, tmp_path / "out", formats=["safetensors"])
    assert used_ground_truth(tmp_path / "out")
