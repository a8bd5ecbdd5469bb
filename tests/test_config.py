"""Presets and `config.yaml`."""

import dataclasses
import math

import pytest

from mcic.config import Config, DataConfig, EvalConfig, MethodConfig, RunConfig, TrainConfig
from mcic.config_io import config_from_dict, load_config, save_config
from mcic.model.propagation import Propagation
from mcic.presets import PRESETS, preset

UNUSUAL = Config(
    data=DataConfig(name="folder", root="päth with: colon", saliency="none", workers=0),
    method=MethodConfig(rules="authors", masks=("merged", "cam"), temperature=1e-7, ema_momentum=0.999, slots=1),
    train=TrainConfig(scale=(0.123456789012345, 1e10), lr=3e-5, clip_grad=1.0, flip=False),
    run=RunConfig(dir="no", resume="auto"),
)


@pytest.mark.parametrize("config", [*(build() for build in PRESETS.values()), UNUSUAL], ids=[*PRESETS, "unusual"])
def test_round_trip(config, tmp_path):
    for stored in (config, config.resolved()):
        save_config(stored, tmp_path / "config.yaml")
        loaded = load_config(tmp_path / "config.yaml")
        assert loaded == stored
        assert isinstance(loaded.train.scale, tuple)
        assert isinstance(loaded.method.masks, tuple)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_and_resolve(name):
    config = preset(name)
    assert config.preset == name
    resolved = config.resolved()
    unset = [field.name for field in dataclasses.fields(MethodConfig) if getattr(resolved.method, field.name) is None]
    assert set(unset) == {"temperature", "ema_momentum"}
    assert resolved.train.lr_schedule == "step"


def test_presets_are_fresh_copies():
    preset("shapes").train.epochs = 99
    assert preset("shapes").train.epochs != 99


def test_paper_presets():
    vgg, coco = preset("voc12-vgg16"), preset("coco14-resnet101")
    assert (vgg.model.segmentation_head, vgg.train.size, vgg.eval) == ("lfov", 321, EvalConfig(protocol="voc"))
    assert (coco.model.segmentation_head, coco.train.size, coco.model.weights) == ("aspp", 417, "imagenet")
    assert vgg.method == coco.method == MethodConfig()
    assert (vgg.train.lr, vgg.train.epochs, vgg.train.batch_size, vgg.train.scale) == (1e-3, 20, 16, (0.5, 1.5))


def test_defaults_are_those_of_the_paper():
    method, train = MethodConfig(), TrainConfig()
    assert (method.cam_threshold, method.pool_threshold, method.slots, method.heads) == (0.1, 0.5, 64, 1)
    assert (method.temperature, method.ramp_epochs, method.attention_threshold) == (None, 5.0, 0.0)
    assert Propagation(16).scale == 1 / 4  # τ = √D
    assert (train.lr, train.new_layer_lr, train.momentum, train.weight_decay) == (1e-3, 10, 0.9, 5e-4)
    assert (train.lr_power, train.epochs, train.batch_size, train.size) == (0.9, 20, 16, 321)
    assert (train.scale, train.flip, train.optimizer) == ((0.5, 1.5), True, "sgd")
    assert (train.warmup_steps, train.color_jitter) == (0, 0.0)


def test_each_set_of_rules_is_whole():
    authors, paper = Config(method=MethodConfig(rules="authors")).resolved(), Config().resolved()
    names = ("ramp_power", "cam_floor", "entropy_weight", "saliency_weight", "merge_rule", "confidence_rule",
             "classification_rule", "cam_background", "context_background", "padding_rule")  # fmt: skip
    assert [getattr(authors.method, name) for name in names] == [2, 0.6, 0.0, 0.5, *["authors"] * 6]
    assert [getattr(paper.method, name) for name in names] == [1, 1.0, 1.0, 0.5, *["paper"] * 6]
    assert (authors.train.lr_schedule, authors.model.classification_head) == ("epoch", "deep")
    assert (paper.train.lr_schedule, paper.model.classification_head) == ("step", "linear")


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="got 'voc12-vg16'; did you mean 'voc12-vgg16'"):
        preset("voc12-vg16")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": {"slot": 3}}, r"method\.slot is no field .*; did you mean 'slots'"),
        ({"metod": {}}, r"metod is no field .*; did you mean 'method'"),
        ({"method": {"slots": "many"}}, r"method\.slots must be a whole number, got 'many'"),
        ({"method": {"slots": True}}, r"method\.slots must be a whole number, got True"),
        ({"method": {"slots": None}}, r"method\.slots must be a whole number, got None"),
        ({"train": {"flip": 1}}, r"train\.flip must be true or false, got 1"),
        ({"train": {"lr": "fast"}}, r"train\.lr must be a number, got 'fast'"),
        ({"train": {"lr": True}}, r"train\.lr must be a number, got True"),
        ({"train": {"scale": [1.0]}}, r"train\.scale must have 2 values"),
        ({"train": {"scale": 1.0}}, r"train\.scale must be a list"),
        ({"train": []}, r"train must be a mapping"),
        ({"model": {"backbone": "vgg61"}}, r"model\.backbone must be one of .*; did you mean 'vgg16'"),
        ({"method": {"masks": ["cam", "mergd"]}}, r"method\.masks must be one of .*; did you mean 'merged'"),
        ({"method": {"slots": 0}}, r"--method\.slots must be 1 or more, got 0"),
        ({"method": {"masks": ["cam", "cam"]}}, r"--method\.masks must be each named once"),
        ({"train": {"scale": [0.5, math.inf]}}, r"--train\.scale must be two positive numbers"),
        ({"train": {"momentum": 1.5}}, r"--train\.momentum must be below 1"),
        ({"train": {"color_jitter": 50.0}}, r"--train\.color-jitter must be 0…1"),
        ({"train": {"seed": 2**64}}, r"--train\.seed must be below 2⁶³"),
        ({"run": {"rank_timeout": 1e15}}, r"--run\.rank-timeout must be positive, at most 1e9"),
        ([1], "a configuration must be a mapping"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(values)


def test_a_file_that_a_person_wrote(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {lr: 1e-3, size: 64, scale: [1, 2]}\n")  # 1e-3 is text in YAML
    train = load_config(path).train
    assert (train.lr, train.size, train.scale) == (1e-3, 64, (1.0, 2.0))
    assert type(train.scale[0]) is float
    path.write_text("train: {lr: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not YAML"):
        load_config(path)
    path.write_text("")
    assert load_config(path) == Config()


def test_a_home_that_the_shell_left_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ant")
    config = config_from_dict({"run": {"dir": "~/runs/a", "resume": "~/b"}, "data": {"cache": "~/cache"}})
    assert (config.run.dir, config.run.resume, config.data.cache) == (
        "/home/ant/runs/a",
        "/home/ant/b",
        "/home/ant/cache",
    )
