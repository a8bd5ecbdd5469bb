"""The `authors` rules reproduce numbers of the published modules."""

import pytest
import torch
from conftest import relative_error

from mcic.losses import classification_loss, entropy_loss, segmentation_loss
from mcic.model.memory import MemoryBank
from mcic.model.propagation import Propagation
from mcic.ops import attention_weights, class_pool, pool_weights, sparse_attention
from mcic.pseudo import IGNORE, cam_mask, cam_scores, context_mask, context_scores, merge_masks, resize_like
from mcic.schedule import ramp_up

FORWARD, GRADIENT = 1e-5, 1e-4


def propagation_from(golden: dict) -> Propagation:
    module = Propagation(golden["query"].shape[-1], heads=golden["heads"])
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    with torch.no_grad():
        for name, letter in names.items():
            linear = getattr(module, name)
            linear.weight.copy_(golden[f"p.linear_{letter}.weight"])
            linear.bias.copy_(golden[f"p.linear_{letter}.bias"])
    return module


def as_bank(golden: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The golden memory as a bank in which every entry is a class of its own: any mask can then be said in classes."""
    memory = golden["memory"]
    return memory[:, None], torch.ones(len(memory), dtype=torch.int32), ~golden["mask"]


@pytest.mark.parametrize("name", ["attention_h1", "attention_h4"])
@pytest.mark.parametrize("form", ["absorbed in the bank", "absorbed in the query"])
def test_attention(golden, name, form):
    g = golden(name)
    module = propagation_from(g)
    entries, counts, readable = as_bank(g)
    query = g["query"].transpose(0, 1).clone().requires_grad_()  # [B, N, D]
    message = module.message if form == "absorbed in the bank" else module._message_raw_bank
    out, entropy = message(query, entries, counts, readable)
    (out * g["grad_out"].transpose(0, 1)).sum().backward()

    assert relative_error(out, g["out"].transpose(0, 1)) <= FORWARD
    if g["heads"] == 1:
        assert relative_error(entropy, g["entropy_nats"]) <= FORWARD
    assert relative_error(query.grad, g["grad_query"].transpose(0, 1)) <= GRADIENT
    for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
        linear = getattr(module, ours)
        assert relative_error(linear.weight.grad, g[f"g.linear_{theirs}.weight"]) <= GRADIENT
        if ours != "key":  # the key's bias shifts all scores of a row alike: its gradient is 0 but for rounding
            assert relative_error(linear.bias.grad, g[f"g.linear_{theirs}.bias"]) <= GRADIENT


@pytest.mark.parametrize("name", ["attention_h1", "attention_h4"])
def test_attention_weights(golden, name):
    g = golden(name)
    module = propagation_from(g)
    entries, counts, readable = as_bank(g)
    keys, bias = module._keys(entries)
    query = g["query"].transpose(0, 1)
    weights = attention_weights(query, keys, bias, counts, readable, scale=module.scale, threshold=0.0)
    assert relative_error(weights.mean(1).flatten(2), g["weights"]) <= FORWARD


def test_bank(golden):
    g = golden("bank")
    bank = MemoryBank(g["num_classes"], g["capacity"], g["dim"])
    for step in range(g["steps"]):
        labels = g[f"push{step}.labels"].to(torch.int32)
        bank.push(g[f"push{step}.features"], labels, torch.full((len(labels),), step))
        counts, cursor = bank.counts.tolist(), bank.cursor.tolist()
        assert counts == g[f"push{step}.counts"].tolist()
        for k in range(g["num_classes"]):
            oldest_first = [(cursor[k] - counts[k] + i) % g["capacity"] for i in range(counts[k])]
            assert torch.equal(bank.entries[k, oldest_first], g[f"push{step}.class{k}"].reshape(counts[k], g["dim"]))


@pytest.mark.parametrize("name", ["pool", "pool_resized"])
def test_pool(golden, name):
    g = golden(name)
    confidence = resize_like(g["conf"], g["feat"].shape[-2:])
    tags = g["labels"].bool()
    weights = pool_weights(confidence, tags, threshold=g["threshold"], rule="authors")
    contexts, sums, valid = class_pool(g["feat"], confidence, tags, threshold=g["threshold"], rule="authors")
    assert relative_error(weights, g["weights"]) <= FORWARD
    assert relative_error(sums, g["weights"].sum((2, 3))) <= FORWARD
    assert valid.nonzero()[:, 1].tolist() == g["context_labels"].tolist()
    assert relative_error(contexts[valid], g["contexts"]) <= FORWARD


@pytest.mark.parametrize("name", ["masks", "masks2"])
def test_masks(golden, name):
    g = golden(name)
    tags, saliency = g["labels_fg"].bool(), g["saliency"] / 255
    cam = {"threshold": g["cam_threshold"], "rules": "authors"}
    context = {"rules": "authors", "saliency_weight": g["saliency_weight"]}
    threshold = g["seg_threshold"]

    assert relative_error(cam_scores(g["cam"], tags, saliency, **cam), g["score_cam"]) <= FORWARD
    assert relative_error(context_scores(g["seg"], tags, saliency, **context), g["score_seg"]) <= FORWARD
    first = cam_mask(g["cam"], tags, saliency, **cam)
    second = context_mask(g["seg"], tags, saliency, threshold=threshold, **context)
    without = context_mask(g["seg"], tags, None, threshold=threshold, **context)
    merged = merge_masks(first, second, rules="authors")
    for ours, theirs in ((first, "cam"), (second, "seg"), (without, "seg_nosal"), (merged, "merged")):
        assert torch.equal(ours.long(), g[f"mask_{theirs}"]), theirs
    assert {0, IGNORE} < set(merged.unique().tolist())


@pytest.mark.parametrize("name", ["masks", "masks2"])
def test_losses(golden, name):
    g = golden(name)
    for kind in ("cam", "seg", "merged"):
        logits = g["logits"].clone().requires_grad_()
        loss = segmentation_loss(logits, g[f"mask_{kind}"].to(torch.uint8))
        loss.backward()
        assert relative_error(loss, torch.tensor(g[f"ce_{kind}"])) <= FORWARD
        assert relative_error(logits.grad, g[f"ce_grad_{kind}"]) <= GRADIENT
    height, width = g["logits"].shape[-2:]
    larger = resize_like(g["logits"], (2 * height - 1, 2 * width - 1))
    resized = segmentation_loss(larger, g["mask_cam"].to(torch.uint8))
    assert relative_error(resized, torch.tensor(g["ce_resized_cam"])) <= FORWARD
    cls = classification_loss(g["cls_logits"][:, :, None, None], g["labels_fg"].bool(), rules="authors")
    assert relative_error(cls, torch.tensor(g["cls_loss"])) <= FORWARD


@pytest.mark.parametrize("name", ["masks", "masks2"])
def test_entropy(golden, name):
    g = golden(name)
    logits = g["attn_logits"]  # [B, N, M]; scores are the query itself when the keys are unit vectors
    batch, _, entries = logits.shape
    readable = logits.isfinite().all(1)
    counts = torch.ones(entries, dtype=torch.int32)
    query = logits.masked_fill(logits.isinf(), 0)
    _, entropy = sparse_attention(
        query, torch.eye(entries)[:, None], torch.eye(entries)[:, None], None, counts, readable, scale=1.0
    )
    # Theirs is -Σ p log(p + 1e-5), which lies up to 1e-5 · entries below the entropy.
    expected = torch.tensor(g["attn_entropy"])
    assert 0 <= entropy_loss(entropy) - expected <= 1e-5 * entries
    p = logits.softmax(-1)
    assert relative_error(-(p * (p + 1e-5).log()).sum(-1).mean(), expected) <= FORWARD
    assert entropy.shape == (batch, logits.shape[1])


def test_ramp(golden):
    g = golden("ramp")
    ours = torch.tensor([ramp_up(step, g["total"], power=g["power"]) for step in range(len(g["ramp"]))])
    assert relative_error(ours.double(), g["ramp"]) <= 1e-6
