"""The fused masks against the plain rules in fp64: equal but where a score lies within rounding of another."""

import dataclasses
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcic.kernels import pseudo_masks
from mcic.kernels.pseudo_masks import triton as module

from mcic.config import MethodConfig
from mcic.model import Augmented, Prediction
from mcic.objective import Objective
from mcic.pseudo import IGNORE, cam_mask, cam_scores, context_mask, context_scores, merge_masks

TIE = 1e-6
"""scores in 0…1 that are closer than this may fall either way"""
FLIPS = 1e-3
"""largest share of pixels that may do so"""

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SECONDS = (None, "logits", "context_heatmap")
RULES = ("paper", "authors")


def make(second="logits", *, batch=2, objects=5, height=9, width=11, dtype=torch.float32, saliency=True, valid=True):
    """Random inputs of the operation by name; image 0 has class 1, the last image has every class."""
    tags = torch.rand(batch, objects) < 0.5
    tags[:1, 0] = True
    tags[-1:] = True
    grid = (height, width)
    case = {"heatmap": torch.randn(batch, objects, *grid).to(dtype), "tags": tags}
    case["saliency"] = torch.rand(batch, *grid) if saliency else None
    case["valid"] = torch.rand(batch, *grid) < 0.9 if valid else None
    if second is not None:
        case[second] = (torch.randn(batch, objects + (second == "logits"), *grid) * 2).to(dtype)
    return case


def rules(cam="paper", context="paper", merge="paper", *, threshold=0.3, power=1.0, weight=0.4):
    return {
        "cam_background": cam, "context_background": context, "merge_rule": merge, "threshold": threshold,
        "background_power": power, "saliency_weight": weight,
    }  # fmt: skip


def to(device, case):
    return {name: None if tensor is None else tensor.to(device) for name, tensor in case.items()}


def exact(case):
    """The same numbers in fp64."""
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in case.items()}


def fused(device, case, **kwargs):
    return pseudo_masks(**to(device, case), **kwargs, backend="triton").cpu()


def undecided(case, given):
    """Pixels of each mask within rounding of a tie or of the threshold, bool [M, B, H, W]."""
    threshold = given["threshold"]
    shared = {"tags": case["tags"], "saliency": case["saliency"]}
    cam = {"threshold": threshold, "rules": given["cam_background"], "background_power": given["background_power"]}

    def near(scores):
        best = scores.topk(2, 1).values
        return (best[:, 0] - best[:, 1] < TIE) | ((best[:, 0] - threshold).abs() < TIE)

    def near_cam(heatmap):
        band = near(cam_scores(heatmap, **shared, **cam, valid=case["valid"]))
        return band if case["saliency"] is None else band | ((case["saliency"] - threshold).abs() < TIE)

    bands = [near_cam(case["heatmap"])]
    if "logits" in case:
        context = {"saliency_weight": given["saliency_weight"], "rules": given["context_background"]}
        bands.append(near(context_scores(case["logits"], **shared, **context)))
    elif "context_heatmap" in case:
        bands.append(near_cam(case["context_heatmap"]))
    return torch.stack([*bands, bands[0] | bands[1]]) if len(bands) == 2 else bands[0][None]


def assert_same_masks(actual, case, given):
    """Equal to the fp64 reference outside the band; returns the share of pixels that differ."""
    case = exact(case)
    expected = pseudo_masks(**case, **given, backend="reference")
    assert actual.shape == expected.shape
    assert actual.dtype == torch.uint8
    differs = actual != expected
    assert not (differs & ~undecided(case, given)).any()
    return differs.double().mean().item() if differs.numel() else 0.0


@pytest.mark.parametrize("second", SECONDS)
def test_every_rule(device, second):
    context_rules = RULES if second == "logits" else RULES[:1]
    merge_rules = RULES if second is not None else RULES[:1]
    seen = set()
    for saliency, valid, *names in product((True, False), (True, False), RULES, context_rules, merge_rules):
        case = make(second, saliency=saliency, valid=valid)
        masks = fused(device, case, **rules(*names))
        assert_same_masks(masks, case, rules(*names))
        seen |= set(masks.unique().tolist())
    assert {0, 1, 5, IGNORE} <= seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", ["logits", "context_heatmap"])
@pytest.mark.parametrize("name", RULES)
def test_dtypes(device, dtype, second, name):
    case = make(second, dtype=dtype)
    assert_same_masks(fused(device, case, **rules(name, name, name)), case, rules(name, name, name))


def test_maps_may_differ_in_dtype(device):
    case = make("logits") | {"logits": make("logits", dtype=torch.float16)["logits"]}
    assert_same_masks(fused(device, case, **rules()), case, rules())


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
@pytest.mark.parametrize("power", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("saliency", [True, False])
def test_powers_of_the_background(device, power, saliency):
    case = make(None, saliency=saliency)
    if saliency:
        case["saliency"][0, :2] = 1.0  # 0 to a power
    assert_same_masks(fused(device, case, **rules(power=power)), case, rules(power=power))


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("name", RULES)
def test_thresholds(device, threshold, name):
    case, given = make("logits"), rules(name, name, name, threshold=threshold)
    masks = fused(device, case, **given)
    assert_same_masks(masks, case, given)
    labelled = (masks[:2] != IGNORE).float().mean() / case["valid"].float().mean()
    assert labelled == 1 if threshold == 0 else labelled == 0 if threshold == 2 else True


@pytest.mark.parametrize("name", RULES)
def test_few_pixels_fall_the_other_way(device, name, monkeypatch):
    if device.type == "cpu":  # the interpreter takes long over a whole map for each tile
        monkeypatch.setattr(module, "ONE_LAUNCH_PIXELS", 0)
    case = make("logits", batch=1, objects=4, height=41, width=41)
    assert assert_same_masks(fused(device, case, **rules(name, name, name)), case, rules(name, name, name)) <= FLIPS


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("saliency", [True, False])
def test_equal_scores_are_decided_as_the_reference_decides(device, second, name, saliency):
    """Whole numbers: many pixels where classes, or a class and background, are equal."""
    case = make(second, saliency=saliency)
    for maps in ("heatmap", "logits", "context_heatmap"):
        if maps in case:
            case[maps] = case[maps].clamp(-2, 2).round()
    if saliency:
        case["saliency"] = case["saliency"].round()
    case["tags"][:] = True
    given = rules(name, name, name)
    expected = pseudo_masks(**case, **given, backend="reference")
    assert torch.equal(fused(device, case, **given), expected)


@pytest.mark.parametrize(
    ("batch", "objects", "height", "width"),
    [(1, 1, 1, 1), (2, 1, 1, 70), (1, 2, 65, 1), (3, 7, 8, 8), (1, 30, 3, 5), (1, 130, 2, 3)],
)
@pytest.mark.parametrize("second", ["logits", "context_heatmap"])
def test_sizes(device, batch, objects, height, width, second):
    case = make(second, batch=batch, objects=objects, height=height, width=width)
    assert_same_masks(fused(device, case, **rules()), case, rules())


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("size", [{"batch": 0}, {"height": 0}])
def test_nothing(device, second, size):
    case = make(second, **size)
    masks = fused(device, case, **rules())
    assert masks.shape == (1 if second is None else 3, *case["heatmap"].shape[::2], case["heatmap"].shape[3])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("saliency", [True, False])
def test_images_without_tags_or_valid_pixels(device, name, second, saliency):
    case, given = make(second, batch=3, saliency=saliency), rules(name, name, name)
    case["tags"][0] = False
    case["valid"][1] = False
    masks = fused(device, case, **given)
    assert_same_masks(masks, case, given)
    assert (masks[:, 1] == IGNORE).all()
    assert set(masks[:, 0].unique().tolist()) <= {0, IGNORE}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    second=st.sampled_from(SECONDS),
    names=st.tuples(*[st.sampled_from(RULES)] * 3),
    present=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_shape(device, sizes, second, names, present, seed):
    torch.manual_seed(seed)
    keys = ("batch", "objects", "height", "width", "saliency", "valid")
    case = make(second, **dict(zip(keys, sizes + present, strict=True)))
    assert_same_masks(fused(device, case, **rules(*names)), case, rules(*names))


def test_layouts(device):
    """Channels-last, transposed, expanded and cut-out inputs give what their contiguous copies give."""
    case, given = make("logits", height=10, width=10), rules("authors", "authors", "authors")
    plain = {name: tensor.contiguous() for name, tensor in case.items()}
    base = fused(device, plain, **given)
    last = {"memory_format": torch.channels_last}
    case["heatmap"], case["logits"] = case["heatmap"].contiguous(**last), case["logits"].contiguous(**last)
    case["saliency"] = case["saliency"].transpose(1, 2).contiguous().transpose(1, 2)
    case["valid"] = torch.stack([case["valid"]] * 2, -1)[..., 0]
    case["tags"] = torch.stack([case["tags"]] * 3, 1)[:, 1]
    assert torch.equal(fused(device, case, **given), base)
    assert torch.equal(fused(device, case | {"heatmap": plain["heatmap"]}, **given), base)
    for name in ("heatmap", "logits"):
        case[name] = plain[name].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(fused(device, case, **given), base)
    for name in ("heatmap", "logits"):
        padded = torch.full((2, plain[name].shape[1] + 2, 12, 12), torch.nan)
        padded[:, 1:-1, 1:-1, 1:-1] = plain[name]
        case[name] = padded[:, 1:-1, 1:-1, 1:-1]
    assert torch.equal(fused(device, case, **given), base)
    one = {name: tensor[1:] for name, tensor in plain.items()}
    several = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in one.items()}
    assert torch.equal(fused(device, several, **given), base[:, 1:].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("second", ["logits", "context_heatmap"])
def test_nothing_beyond_the_inputs_is_used(device, second):
    """Inputs between NaNs and set flags, outputs filled before they are written."""
    case, given = make(second, height=7, width=9), rules(threshold=0.0)

    def between(tensor):
        fill = torch.nan if tensor.is_floating_point() else True
        storage = torch.full((tensor.numel() + 2048,), fill, dtype=tensor.dtype, device=device)
        storage[1024:-1024] = tensor.flatten()
        return storage[1024:-1024].view(tensor.shape)

    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        masks = fused(device, {name: between(tensor.to(device)) for name, tensor in case.items()}, **given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_masks(masks, case, given)
    assert (masks[0] != IGNORE).any()


def test_absent_classes_are_not_looked_at(device):
    case, given = make("context_heatmap"), rules()
    expected = fused(device, case, **given)
    absent = ~case["tags"][:, :, None, None]
    for name in ("heatmap", "context_heatmap"):
        case[name] = case[name].masked_fill(absent, torch.nan)
    assert absent.any()
    assert torch.equal(fused(device, case, **given), expected)


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("valid", [True, False])
def test_large_grids_take_their_peaks_from_another_launch(device, second, valid, monkeypatch):
    case = make(second, valid=valid)
    expected = fused(device, case, **rules())
    monkeypatch.setattr(module, "ONE_LAUNCH_PIXELS", 0)
    assert torch.equal(fused(device, case, **rules()), expected)


def test_repeats_are_equal(device):
    case = make("logits")
    expected = fused(device, case, **rules())
    assert all(torch.equal(fused(device, case, **rules()), expected) for _ in range(50 if device.type == "cuda" else 3))


def arguments(case, *, authors):
    return (case["heatmap"], case["tags"], case["saliency"], case["valid"], case.get("logits"),
            case.get("context_heatmap"), 0.3, 1.5, 0.5, authors, authors, authors)  # fmt: skip


@pytest.mark.parametrize("second", SECONDS)
def test_opcheck(device, second):
    fused(device, make(None), **rules())  # registers the operation
    for present in (True, False):
        case = to(device, make(second, height=3, width=4, saliency=present, valid=present))
        case["heatmap"].requires_grad_()
        torch.library.opcheck(torch.ops.mcic.pseudo_masks.default, arguments(case, authors=present))


@pytest.mark.parametrize("second", SECONDS)
def test_compiles_into_one_graph(device, second):
    case = to(device, make(second))
    function = torch.compile(pseudo_masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**case, **rules(), backend="triton").cpu(), fused(device, case, **rules()))


def test_maps_that_carry_gradients(device):
    case = make("logits")
    expected = fused(device, case, **rules())
    case["heatmap"].requires_grad_()
    case["logits"].requires_grad_()
    masks = fused(device, case, **rules())
    assert torch.equal(masks, expected)
    assert not masks.requires_grad


@pytest.mark.parametrize("name", RULES)
def test_reference_is_the_rules_in_turn(name):
    case, given = make("logits"), rules(name, name, name, power=1.5)
    first = cam_mask(
        case["heatmap"], case["tags"], case["saliency"], threshold=0.3, rules=name, background_power=1.5,
        valid=case["valid"],
    )  # fmt: skip
    second = context_mask(
        case["logits"], case["tags"], case["saliency"], threshold=0.3, saliency_weight=0.4, rules=name,
        valid=case["valid"],
    )  # fmt: skip
    expected = torch.stack([first, second, merge_masks(first, second, rules=name)])
    assert torch.equal(pseudo_masks(**case, **given, backend="reference"), expected)
    assert torch.equal(pseudo_masks(**(case | {"logits": None}), **given, backend="reference"), expected[:1])
    twice = case | {"logits": None, "context_heatmap": case["heatmap"]}
    assert torch.equal(pseudo_masks(**twice, **given, backend="reference"), torch.stack([first] * 3))


@pytest.mark.parametrize("method_rules", RULES)
@pytest.mark.parametrize("head", ["segmentation", "classification"])
@pytest.mark.parametrize("context", ["bank", "self", "none"])
def test_objective(device, method_rules, head, context):
    """The configuration reaches the kernels: the same masks as the reference's, saliency resized."""
    case = to(device, make("logits", valid=False)) | {"saliency": torch.rand(2, 33, 41, device=device)}
    second = case["logits"].flip(0)
    prediction = Prediction(case["heatmap"], case["heatmap"], case["logits"])
    heatmap = second[:, 1:] if head == "classification" else None
    augmented = Augmented(second, heatmap, second.sum(1), second) if context == "bank" else None
    method = MethodConfig(
        rules=method_rules, context=context, context_head=head, cam_threshold=0.3, background_power=1.5
    )
    method = dataclasses.replace(method, masks=("cam", "merged")).resolved()
    ours, theirs = (
        Objective(method, backend=backend).masks(
            prediction, augmented, case["tags"], case["saliency"], None, images=None
        )
        for backend in ("triton", "reference")
    )
    assert ours.stacked.shape[0] == (1 if context == "none" else 3)
    assert (ours.stacked != theirs.stacked).float().mean() <= FLIPS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"heatmap": torch.zeros(2, 5, 99)}, "heatmap must be floating point"),
        ({"heatmap": torch.zeros(2, 5, 9, 11, dtype=torch.int32)}, "heatmap must be floating point"),
        ({"tags": torch.ones(2, 5)}, "tags must be torch.bool"),
        ({"tags": torch.ones(2, 6, dtype=torch.bool)}, r"tags must be torch.bool \[2, 5\]"),
        ({"saliency": torch.zeros(2, 18, 22)}, r"saliency must be floating point \[2, 9, 11\]"),
        ({"saliency": torch.zeros(2, 9, 11, dtype=torch.uint8)}, "saliency must be floating point"),
        ({"valid": torch.ones(2, 9, 11)}, "valid must be torch.bool"),
        ({"logits": torch.zeros(2, 5, 9, 11)}, r"logits must be floating point \[2, 6, 9, 11\]"),
        ({"context_heatmap": torch.zeros(2, 5, 9, 11)}, "from logits or from context_heatmap"),
        ({"logits": None, "context_heatmap": torch.zeros(2, 6, 9, 11)}, "context_heatmap must be"),
        ({"cam_background": "papers"}, "cam_background must be one of paper, authors"),
        ({"context_background": "papers"}, "context_background must be one of"),
        ({"merge_rule": "papers"}, "merge_rule must be one of"),
        ({"background_power": -1.0}, "background_power must be 0 or more"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
    ],
)
def test_names_what_does_not_fit(change, named):
    with pytest.raises(ValueError, match=named):
        pseudo_masks(**(make("logits") | rules() | change))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_score_at_the_threshold_is_kept(device, backend):
    saliency = torch.tensor([[[0.75, 0.75, 0.5, 0.25]]], device=device)
    heatmap = torch.tensor([[[[0.0, 0.0, -1.0, 4.0]]]], device=device)
    tags = torch.ones(1, 1, dtype=torch.bool, device=device)
    for rules, threshold, expected in (
        ("paper", 0.25, [0, 0, 0, 1]), ("paper", 0.5, [255, 255, 0, 1]), ("authors", 0.25, [255, 255, 255, 1]),
    ):  # fmt: skip
        mask = pseudo_masks(
            heatmap, tags, saliency, threshold=threshold, cam_background=rules, backend=backend
        )  # fmt: skip
        assert mask[0].flatten().tolist() == expected
