"""The model and a training step: exactness of the absorbed projections, the stop-gradient, and the edges."""

import dataclasses

import pytest
import torch
from mcic.kernels import class_pool
from torch import nn

from mcic.build import build_model
from mcic.config import MethodConfig, ModelConfig
from mcic.data import Batch
from mcic.losses import classification_loss
from mcic.model import Contexts
from mcic.model.propagation import Propagation, dropout_mask
from mcic.objective import Objective, push, sample_grid
from mcic.optim import build_optimizer
from mcic.pseudo import IGNORE, cam_mask, context_mask, with_background

L, SIZE = 3, 33


def make(method=None, **fields):
    """A small model, its objective and their resolved method."""
    method = dataclasses.replace(method or MethodConfig(slots=4, pool_threshold=0.26), **fields).resolved()
    config = ModelConfig(backbone="tiny", segmentation_head="linear", classification_head="linear")
    model = build_model(config, method, num_classes=L + 1, backend="auto")
    return model, Objective(method)


def make_batch(tags=((1, 0, 0), (1, 1, 0)), *, saliency=True):
    images = torch.randn(len(tags), 3, SIZE, SIZE)
    return Batch(
        images=images,
        tags=torch.tensor(tags, dtype=torch.bool),
        saliency=torch.rand(len(tags), SIZE, SIZE) if saliency else None,
        masks=torch.randint(0, L + 1, (len(tags), SIZE, SIZE), dtype=torch.uint8),
        confidence=None,
        valid=torch.ones(len(tags), SIZE, SIZE, dtype=torch.bool),
        indices=torch.arange(len(tags)) + 10,
    )


def fill(model, rows=12):
    """Put random contexts of every class into the bank."""
    labels = torch.arange(rows, dtype=torch.int32) % (L + 1)
    push(model, Contexts(torch.randn(rows, model.memory.entries.shape[-1]), labels, torch.arange(rows)))


RAMP = torch.tensor(0.7)


@pytest.mark.parametrize("heads", [1, 4])
def test_absorbed_projections_equal_the_plain_form(heads):
    """Against multi-head attention as everyone writes it, in fp64, forward and every gradient."""
    torch.set_default_dtype(torch.float64)
    try:
        d = 8
        module = Propagation(d, heads=heads)
        query = torch.randn(2, 5, d, requires_grad=True)
        entries, counts = torch.randn(3, 4, d), torch.tensor([4, 2, 0], dtype=torch.int32)
        classes = torch.tensor([[True, False, True], [True, True, True]])
        target = torch.randn(2, 5, d)

        def plain():
            readable = (classes[:, :, None] & (torch.arange(4) < counts[:, None])).flatten(1)
            split = lambda t: t.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
            rows = entries.flatten(0, 1)
            q, k, v = split(module.query(query)), split(module.key(rows)), split(module.value(rows))
            scores = (q @ k.transpose(-1, -2) * module.scale).masked_fill(~readable[:, None, None], -torch.inf)
            return module.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        def results(message):
            inputs = [query, *module.parameters()]
            gradients = torch.autograd.grad((message * target).sum(), inputs, allow_unused=True, materialize_grads=True)
            return [message, *gradients]

        expected = results(plain())
        for form in (module.message, module._message_raw_bank):
            for ours, theirs in zip(results(form(query, entries, counts, classes)[0]), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_gain_is_the_configured_one():
    model, _ = make(message_gain=0.25)
    assert (model.propagation.norm.weight == 0.25).all()
    with pytest.raises(ValueError, match=r"method\.message-gain must be positive, got 0"):
        make(message_gain=0)


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_a_small_gain_starts_near_the_features_and_can_grow(gain):
    torch.manual_seed(0)
    whole, small = Propagation(8, dropout=0.0), Propagation(8, dropout=0.0, gain=gain)
    small.load_state_dict(whole.state_dict() | {"norm.weight": small.norm.weight})
    bank = torch.randn(3, 4, 8), torch.full((3,), 4, dtype=torch.int32), torch.ones(2, 3, dtype=torch.bool)
    features = torch.randn(2, 8, 5, 5)
    update = small(features, *bank).update
    torch.testing.assert_close(update, gain * whole(features, *bank).update)
    update.square().sum().backward()
    assert (small.norm.weight.grad > 0).any()


def test_large_banks_take_the_other_form_with_the_same_result():
    module = Propagation(8).double()
    entries, counts = torch.randn(3, 40, 8).double(), torch.tensor([40, 2, 9], dtype=torch.int32)
    features = torch.randn(2, 8, 3, 3).double()
    classes = torch.ones(2, 3, dtype=torch.bool)
    module.eval()
    few_pixels = module(features, entries, counts, classes)  # 120 rows against 18 pixels
    many_pixels = module(features.repeat(1, 1, 3, 3), entries, counts, classes)  # against 162
    torch.testing.assert_close(many_pixels.update[..., :3, :3], few_pixels.update)


def test_stop_gradient_reaches_only_the_propagation():
    """E16: the context branch's own losses leave backbone and heads with gradients that are exactly zero."""
    model, _ = make()
    fill(model)
    batch = make_batch()
    augmented = model.read(model(batch.images), batch.tags)
    (augmented.logits.square().sum() + augmented.entropy.sum()).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"propagation"}


def test_without_stop_gradient_it_reaches_backbone_and_head():
    model, _ = make(stop_gradient=False)
    fill(model)
    batch = make_batch()
    model.read(model(batch.images), batch.tags).logits.square().sum().backward()
    reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"backbone", "segmentation_head"} <= reached


def test_a_step_trains_every_part():
    model, objective = make()
    fill(model)
    out = objective(model, make_batch(), RAMP)
    out.total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ["propagation.key.bias"] or still == []  # the key's bias cancels in the softmax, but for rounding


def test_total_is_the_sum_of_its_terms():
    model, objective = make(entropy_weight=0.5, segmentation_weight=2.0)
    fill(model)
    terms = objective(model, make_batch(), RAMP).terms
    parts = sum(terms[f"loss/{branch}_{mask}"] for branch in "sc" for mask in ("cam", "context", "merged"))
    torch.testing.assert_close(terms["loss/segmentation"], parts)
    expected = terms["loss/classification"] + RAMP * (2 * parts + 0.5 * terms["loss/entropy"])
    torch.testing.assert_close(terms["loss/total"], expected)


def test_authors_floor_scales_the_cam_terms():
    model, objective = make(cam_floor=0.6, masks=("cam",))
    fill(model)
    for ramp, factor in ((0.1, 0.9), (0.7, 0.6)):
        terms = objective(model, make_batch(), torch.tensor(ramp)).terms
        parts = terms["loss/s_cam"] + terms["loss/c_cam"]
        torch.testing.assert_close(terms["loss/segmentation"], factor * parts)


def test_contexts_carry_their_image_and_class():
    model, objective = make()
    objective(model, make_batch(), RAMP)
    ids = model.memory.ids
    assert set(ids.unique().tolist()) <= {-1, 10, 11}
    assert (model.memory.counts.sum() == (ids >= 0).sum()).all()
    assert model.memory.counts[3] == 0  # no image has this tag
    assert model.memory.counts[0] > 0


@pytest.mark.parametrize("self_read", [True, False])
def test_self_read_decides_when_contexts_enter(self_read):
    model, objective = make(self_read=self_read)
    out = objective(model, make_batch(), RAMP)
    assert (out.contexts is None) == self_read
    assert bool(model.memory.counts.any()) == self_read
    assert (out.terms["message_norm"] > 0) == self_read  # it read what it had just stored, or an empty bank


def test_pixel_bank_stores_every_confident_pixel():
    model, _ = make(pixel_bank=True, pool_threshold=0.3, slots=200)
    batch = make_batch()
    prediction = model(batch.images)
    rows = model.pool(batch.images, prediction, batch.tags, torch.ones(2, 9, 9, dtype=torch.bool), batch.indices)
    probabilities = prediction.logits.softmax(1)
    tagged = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)[:, :, None, None]
    confident = (probabilities * tagged).amax(1) > 0.3
    assert 0 < confident.sum() < confident.numel()
    assert ((rows.labels >= 0) == confident.flatten()).all()
    torch.testing.assert_close(rows.vectors[0], prediction.features[0, :, 0, 0])


def test_a_16_bit_bank_reads_nearly_the_same():
    full, _ = make()
    half, _ = make(bank_precision="bf16")
    half.load_state_dict(full.state_dict())
    batch = make_batch()
    for model in (full, half):
        torch.manual_seed(1)
        fill(model)
        model.eval()
    assert half.memory.entries.dtype == torch.bfloat16
    ours, theirs = (m.read(m(batch.images), batch.tags).update for m in (half, full))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_moving_average_makes_the_contexts():
    model, _ = make(ema_momentum=0.9, pool_threshold=0.0)
    with torch.no_grad():
        for p in model.ema.parameters():
            p.zero_()
    batch = make_batch()
    valid = torch.ones(2, 9, 9, dtype=torch.bool)
    rows = model.pool(batch.images, model(batch.images), batch.tags, valid, batch.indices)
    assert not rows.vectors.any()
    assert model.training
    assert not any(module.training for module in model.ema.modules())  # no dropout, no batch statistics
    model.update_ema()
    weight = model.network.segmentation_head.weight
    torch.testing.assert_close(model.ema.segmentation_head.weight, 0.1 * weight)


EDGES = {
    "an empty bank": {},
    "an image with no tag": {"tags": ((0, 0, 0), (0, 0, 0))},
    "all pixels padded": {"valid": False},
    "no saliency": {"saliency": False},
    "one class only": {"tags": ((0, 0, 1), (0, 0, 1))},
}


@pytest.mark.parametrize("rules", ["paper", "authors"])
@pytest.mark.parametrize("context", ["bank", "self", "none"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_finite(rules, context, edge):
    fields = dict(EDGES[edge])
    model, objective = make(rules=rules, context=context)
    valid = fields.pop("valid", True)
    batch = make_batch(**fields)
    if not valid:
        batch = dataclasses.replace(batch, valid=batch.valid & False)
    optimizer = build_optimizer(model, lr=0.1, new_layer_lr=1.0, momentum=0.9, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        out = objective(model, batch, RAMP)
        out.total.backward()
        optimizer.step()
        assert all(value.isfinite().all() for value in out.terms.values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_with_an_empty_bank_nothing_is_added():
    model, _ = make()
    model.eval()
    batch = make_batch()
    prediction = model(batch.images)
    augmented = model.read(prediction, batch.tags)
    assert not augmented.update.any()
    torch.testing.assert_close(augmented.logits, prediction.logits)


@pytest.mark.parametrize("slots", [2, 40])  # both ways to absorb the projections
def test_an_image_that_may_read_nothing_keeps_its_features_beside_one_that_reads(slots):
    module = Propagation(8).eval()
    nn.init.ones_(module.norm.bias)
    entries, counts = torch.randn(3, slots, 8), torch.tensor([0, slots, 0], dtype=torch.int32)
    classes = torch.tensor([[True, True, False], [True, False, True]])
    reading = module(torch.randn(2, 8, 3, 3), entries, counts, classes)
    assert reading.update[0].any()
    assert not reading.update[1].any()
    assert not reading.entropy[1].any()


def test_temperature_and_threshold_reach_the_attention():
    for method, scale in (({"temperature": 2.0}, 0.5), ({}, 64**-0.5), ({"heads": 4}, 16**-0.5)):
        model, _ = make(attention_threshold=0.7, **method)
        assert model.propagation.scale == pytest.approx(scale)
        assert model.propagation.threshold == 0.7


def test_crop_padding_supervises_under_the_authors_rules_alone():
    for rules, ignored in (("paper", True), ("authors", False)):
        _, objective = make(rules=rules, context="none")
        batch = make_batch()
        batch.valid[:, :, 20:] = False
        assert objective._valid(batch, torch.zeros(2, 3, 9, 9)).all() != ignored


def test_the_control_makes_its_context_mask_from_s():
    model, objective = make(context="self")
    batch = make_batch()
    prediction = model(batch.images)
    masks = objective.masks(prediction, None, batch.tags, batch.saliency, None, batch.images)
    assert torch.equal(masks.context, context_mask(prediction.logits, batch.tags, None, threshold=0.1))


def test_padded_pixels_count_in_no_mean():
    """E1, E4 and E8, against the same of the columns that are inside."""
    model, objective = make(masks=("cam",), pool_threshold=0.0)
    model.eval()
    fill(model)
    batch = make_batch()
    batch.valid[:, :, SIZE // 2 + 2 :] = False  # five of nine columns of features are inside
    prediction, half = model(batch.images), slice(0, 5)
    inside = torch.zeros(2, 9, 9, dtype=torch.bool)
    inside[:, :, half] = True
    assert torch.equal(objective._valid(batch, prediction.features), inside)
    rows = model.pool(batch.images, prediction, batch.tags, inside, batch.indices)
    confidence = prediction.logits[..., half].softmax(1)
    expected, _, _ = class_pool(prediction.features[..., half], confidence, with_background(batch.tags), threshold=0.0)
    torch.testing.assert_close(rows.vectors, expected.flatten(0, 1).detach())
    terms = objective(model, batch, RAMP).terms
    classification = classification_loss(prediction.heatmap[..., half], batch.tags)
    torch.testing.assert_close(terms["loss/classification"], classification.detach())
    entropy = model.read(prediction, batch.tags).entropy.view(2, 9, 9)  # the bank is as the step left it
    torch.testing.assert_close(terms["loss/entropy"], entropy[..., half].mean().detach())


def test_padded_pixels_count_nowhere():
    model, objective = make()
    model.eval()  # no dropout, no batch statistics
    batch = make_batch()
    valid = batch.valid.clone()
    valid[:, :, SIZE // 2 :] = False
    prediction = model(batch.images)
    masks = objective.masks(prediction, None, batch.tags, batch.saliency, valid[:, ::4, ::4], batch.images).named()
    for mask in masks.values():
        assert (mask[:, :, 5:] == IGNORE).all()
        assert (mask[:, :, :4] != IGNORE).any()
    rows = model.pool(batch.images, prediction, batch.tags, valid[:, ::4, ::4] & False, batch.indices)
    assert (rows.labels == -1).all()


def test_control_and_cam_only_have_no_bank():
    for context, masks in (("self", {"cam", "context", "merged"}), ("none", {"cam"})):
        model, objective = make(context=context)
        terms = objective(model, make_batch(), RAMP).terms
        assert model.memory is None
        assert {name[7:] for name in terms if name.startswith("loss/s_")} == masks
        assert not any(name.startswith("loss/c_") for name in terms)


def test_full_supervision_uses_the_given_masks():
    model, objective = make(supervision="full")
    batch = make_batch()
    model.eval()
    terms = objective(model, batch, RAMP).terms
    truth = sample_grid(batch.masks, torch.Size((9, 9)))
    assert (truth == batch.masks[:, ::4, ::4]).all()
    expected = nn.functional.cross_entropy(model(batch.images).logits, truth.long())
    torch.testing.assert_close(terms["loss/segmentation"], 3 * expected)


def test_context_head_classification_makes_the_mask_from_the_heatmap():
    model, objective = make(context_head="classification")
    fill(model)
    batch = make_batch()
    prediction = model(batch.images)
    augmented = model.read(prediction, batch.tags)
    masks = objective.masks(prediction, augmented, batch.tags, batch.saliency, None, batch.images)
    method = objective.method
    cam = cam_mask(
        augmented.heatmap, batch.tags, batch.saliency, threshold=method.cam_threshold, rules=method.cam_background,
        background_power=method.background_power,
    )  # fmt: skip
    assert torch.equal(masks.context, cam)


def test_new_layers_learn_faster():
    model, _ = make()
    model.trained = ("network.backbone",)
    optimizer = build_optimizer(model, lr=0.1, new_layer_lr=10, momentum=0.9, weight_decay=0)
    old, new = optimizer.param_groups
    assert (old["lr"], new["lr"]) == (0.1, 1.0)
    assert {id(p) for p in old["params"]} == {id(p) for p in model.network.backbone.parameters()}
    assert len(old["params"]) + len(new["params"]) == len(list(model.parameters()))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"--method.heads must divide the 64 feature channels, got 7"):
        make(heads=7)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9, 1.0])
def test_dropout_on_the_cpu_drops_its_share(probability):
    like = torch.ones(501, 997)
    factors = dropout_mask(like, probability)
    dropped = factors == 0
    assert dropped.double().mean() == pytest.approx(probability, abs=2e-3)
    assert factors[~dropped].unique().numel() <= 1
    if probability < 1:
        assert factors.mean() == pytest.approx(1, abs=2e-2)
    for period in range(2, 5):  # four elements share a random number
        columns = dropped.flatten()[: 400_000 // period * period].view(-1, period).double()
        assert (columns.mean(0) - probability).abs().max() < 5e-3
    torch.manual_seed(0)
    assert not torch.equal(dropout_mask(like, 0.5), dropout_mask(like, 0.5))


@pytest.mark.parametrize(("value", "precision"), [(torch.nan, "fp32"), (1e8, "fp16")])
@pytest.mark.parametrize("pixel_bank", [False, True])
def test_a_context_that_is_not_finite_is_not_stored(pixel_bank, value, precision):
    """The logits are fine and one feature is not, or is too large for the bank: what it would make of the first image's
    background stays out."""
    model, _ = make(pixel_bank=pixel_bank, bank_precision=precision)
    batch = make_batch()
    prediction = model(batch.images)
    prediction.features.data[0, 3, 2, 2] = value
    prediction.logits.data.zero_()[:, 0] = 9  # background everywhere
    size = prediction.features.shape[-2:]
    rows = model.pool(batch.images, prediction, batch.tags, torch.ones(2, *size, dtype=torch.bool), batch.indices)
    stored = rows.labels >= 0
    assert rows.vectors[stored].to(model.memory.entries.dtype).isfinite().all()
    per_image = size.numel() if pixel_bank else 1
    assert [(stored & (rows.image_ids == image)).sum() for image in (10, 11)] == [per_image - 1, per_image]
