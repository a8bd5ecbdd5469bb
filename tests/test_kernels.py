"""The reference kernels: values by hand, gradients by finite differences, and the contracts' edges."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcic.kernels import class_pool, ring_push_, sparse_attention

F64 = torch.float64


def attention_case(*, heads=None, batch=2, pixels=5, classes=3, slots=4, channels=6, out=7, dtype=F64):
    """Random inputs with a full, a partly filled and an empty class; image b reads different classes."""
    lead = () if heads is None else (heads,)
    query = torch.randn(batch, pixels, channels, dtype=dtype)
    keys = torch.randn(*lead, classes, slots, channels, dtype=dtype)
    values = torch.randn(*lead, classes, slots, out, dtype=dtype)
    bias = torch.randn(*lead, classes, slots, dtype=dtype)
    counts = torch.tensor([slots, max(slots - 2, 0), 0][:classes], dtype=torch.int32)
    class_mask = torch.zeros(batch, classes, dtype=torch.bool)
    class_mask[:, 0] = True
    class_mask[-1, 1:] = True
    return query, keys, values, bias, counts, class_mask


def by_hand(query, keys, values, bias, counts, class_mask, *, scale, threshold):
    """One pixel, one head, one entry at a time."""
    if keys.dim() == 3:
        keys, values, bias = keys[None], values[None], bias[None]
    batch, pixels, _ = query.shape
    message = torch.zeros(batch, pixels, values.shape[-1], dtype=query.dtype)
    entropy = torch.zeros(batch, pixels, dtype=query.dtype)
    for b in range(batch):
        entries = [(k, s) for k in range(len(counts)) for s in range(int(counts[k])) if class_mask[b, k]]
        for n in range(pixels):
            for h in range(keys.shape[0]):
                if not entries:
                    continue
                z = torch.stack([scale * query[b, n] @ keys[h, k, s] + bias[h, k, s] for k, s in entries])
                p = z.exp() / z.exp().sum()
                entropy[b, n] -= (p * p.log()).sum() / keys.shape[0]
                kept = [j for j in range(len(entries)) if p[j] >= threshold / len(entries) or p[j] == p.max()]
                share = p[kept] / p[kept].sum()
                for weight, j in zip(share, kept, strict=True):
                    k, s = entries[j]
                    message[b, n] += weight * values[h, k, s]
    return message, entropy


@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 3.0])
def test_attention_by_hand(heads, threshold):
    case = attention_case(heads=heads)
    message, entropy = sparse_attention(*case, scale=0.4, threshold=threshold)
    expected_message, expected_entropy = by_hand(*case, scale=0.4, threshold=threshold)
    torch.testing.assert_close(message, expected_message)
    torch.testing.assert_close(entropy, expected_entropy)


def test_threshold_drops_entries_and_keeps_the_best():
    case = attention_case()
    dense, _ = sparse_attention(*case, scale=1.0)
    sparse, _ = sparse_attention(*case, scale=1.0, threshold=1.0)
    only_best, _ = sparse_attention(*case, scale=1.0, threshold=1e9)
    assert not torch.allclose(dense, sparse)
    query, keys, values, bias, counts, _ = case
    best = (torch.einsum("nd,sd->ns", query[0], keys[0]) + bias[0]).argmax(-1)  # image 0 reads class 0 alone
    assert counts[0] == keys.shape[1]
    torch.testing.assert_close(only_best[0], values[0, best])


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_attention_gradients(heads, threshold):
    query, keys, values, bias, counts, class_mask = attention_case(heads=heads)
    inputs = [tensor.requires_grad_() for tensor in (query, keys, values, bias)]

    def function(*tensors):
        return sparse_attention(*tensors, counts, class_mask, scale=0.4, threshold=threshold)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_attention_with_nothing_to_read(threshold):
    query, keys, values, bias, counts, class_mask = attention_case()
    for tensor in (query, keys, values, bias):
        tensor.requires_grad_()
    for empty_counts, mask in ((counts * 0, class_mask), (counts, class_mask & False)):
        message, entropy = sparse_attention(
            query, keys, values, bias, empty_counts, mask, scale=1.0, threshold=threshold
        )
        gradients = torch.autograd.grad(message.sum() + entropy.sum(), (query, keys, values, bias))
        assert not message.any()
        assert not entropy.any()
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_unread_slots_may_hold_anything(threshold):
    case = attention_case()
    query, keys, values, bias, counts, class_mask = case
    poisoned = [tensor.clone() for tensor in (keys, values, bias)]
    for tensor in poisoned:
        tensor[1, counts[1] :] = torch.nan
        tensor[2] = torch.inf
    clean = [tensor.requires_grad_() for tensor in (query, keys, values, bias)]
    dirty = [query.detach().clone().requires_grad_(), *(tensor.requires_grad_() for tensor in poisoned)]
    results = []
    for inputs in (clean, dirty):
        message, entropy = sparse_attention(*inputs, counts, class_mask, scale=1.0, threshold=threshold)
        results.append((message, entropy, *torch.autograd.grad(message.square().sum() + entropy.sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.isfinite().all()


def test_uniform_attention_has_the_entropy_of_its_size():
    query, keys, values, _, counts, class_mask = attention_case()
    _, entropy = sparse_attention(query * 0, keys, values, None, counts, class_mask, scale=1.0)
    torch.testing.assert_close(entropy[0], torch.tensor(4.0, dtype=F64).log().expand(5))
    torch.testing.assert_close(entropy[1], torch.tensor(6.0, dtype=F64).log().expand(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_16_bit_accumulates_in_32(dtype):
    case = [t.to(dtype) if t.is_floating_point() else t for t in attention_case(channels=64)]
    message, entropy = sparse_attention(*case, scale=0.1)
    exact = [t.double() if t.is_floating_point() else t for t in case]
    expected, expected_entropy = sparse_attention(*exact, scale=0.1)
    assert message.dtype == dtype
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(message.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": torch.zeros(2, 5)}, "query"),
        ({"keys": torch.zeros(3, 4, 5, dtype=F64)}, "keys"),
        ({"keys": torch.zeros(3, 0, 6, dtype=F64)}, "at least one class and one slot"),
        ({"values": torch.zeros(3, 5, 7, dtype=F64)}, "values"),
        ({"key_bias": torch.zeros(3, dtype=F64)}, "key_bias"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, "counts"),
        ({"class_mask": torch.zeros(2, 3)}, "class_mask"),
        ({"threshold": -1.0}, "threshold"),
        ({"backend": "tritn"}, "did you mean 'triton'|Did you mean 'triton'"),
    ],
)
def test_attention_names_what_does_not_fit(change, named):
    names = ("query", "keys", "values", "key_bias", "counts", "class_mask")
    arguments = dict(zip(names, attention_case(), strict=True)) | {"scale": 1.0} | change
    with pytest.raises(ValueError, match=named):
        sparse_attention(**arguments)


def pool_case(dtype=F64):
    features = torch.randn(2, 5, 3, 4, dtype=dtype)
    confidence = torch.randn(2, 3, 3, 4, dtype=dtype).mul(3).softmax(1)
    return features, confidence, torch.tensor([[True, True, False], [True, False, True]])


def test_pool_is_the_weighted_mean():
    features, confidence, classes = pool_case()
    contexts, sums, valid = class_pool(features, confidence, classes, threshold=0.5)
    for b in range(2):
        for k in range(3):
            weights = confidence[b, k] * (confidence[b, k] > 0.5) * classes[b, k]
            torch.testing.assert_close(sums[b, k], weights.sum())
            assert valid[b, k] == (weights.sum() > 0)
            if valid[b, k]:
                torch.testing.assert_close(contexts[b, k], (weights * features[b]).sum((1, 2)) / weights.sum())
            else:
                assert not contexts[b, k].any()
    assert valid.any()
    assert not valid.all()


@pytest.mark.parametrize("rule", ["paper", "authors"])
def test_pool_gradients(rule):
    features, confidence, classes = pool_case()
    logits = confidence.log() + 2 if rule == "authors" else confidence

    def function(features):
        return class_pool(features, logits, classes, threshold=0.3, rule=rule)[0]

    assert function(features).any()
    assert torch.autograd.gradcheck(function, features.requires_grad_())


def test_pool_without_confident_pixels():
    features, confidence, classes = pool_case()
    features.requires_grad_()
    contexts, sums, valid = class_pool(features, confidence * 0, classes, threshold=0.5)
    contexts.sum().backward()
    assert not contexts.any()
    assert not sums.any()
    assert not valid.any()
    assert not features.grad.any()


def test_pool_refuses_what_does_not_fit():
    features, confidence, classes = pool_case()
    with pytest.raises(ValueError, match="one grid"):
        class_pool(features, confidence[..., :2, :], classes, threshold=0.5)
    with pytest.raises(ValueError, match="rule must be one of paper, authors"):
        class_pool(features, confidence, classes, threshold=0.5, rule="papers")


@settings(max_examples=1000, deadline=None)
@given(
    slots=st.integers(1, 5),
    pushes=st.lists(st.lists(st.integers(-2, 2), max_size=9), min_size=1, max_size=8),
)
def test_bank_is_a_deque_per_class(slots, pushes):
    classes, channels = 3, 2
    bank = torch.full((classes, slots, channels), torch.nan)
    ids = torch.full((classes, slots), -1)
    counts, cursor = torch.zeros(2, classes, dtype=torch.int32)
    queues = [deque(maxlen=slots) for _ in range(classes)]
    serial = 0
    for labels in pushes:
        row_ids = torch.arange(serial, serial + len(labels))
        rows = row_ids[:, None].expand(-1, channels).float()
        serial += len(labels)
        ring_push_(bank, ids, counts, cursor, rows, torch.tensor(labels, dtype=torch.int32), row_ids)
        for label, row in zip(labels, row_ids.tolist(), strict=True):
            if label >= 0:
                queues[label].append(row)
        for k, queue in enumerate(queues):
            assert counts[k] == len(queue)
            order = [(int(cursor[k]) - len(queue) + i) % slots for i in range(len(queue))]
            assert bank[k, order, 0].tolist() == list(queue)
            assert ids[k, order].tolist() == list(queue)


def test_push_refuses_and_changes_in_place():
    bank, ids = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    counts, cursor = torch.zeros(2, 2, dtype=torch.int32)
    row, image = torch.ones(1, 4), torch.tensor([7])
    version = bank._version
    ring_push_(bank, ids, counts, cursor, row, torch.tensor([1], dtype=torch.int32), image)
    assert bank._version > version
    assert bank[1, 0].tolist() == [1] * 4
    with pytest.raises(ValueError, match="labels must be below the 2 classes"):
        ring_push_(bank, ids, counts, cursor, row, torch.tensor([2], dtype=torch.int32), image)
    with pytest.raises(ValueError, match=r"labels must be torch.int32"):
        ring_push_(bank, ids, counts, cursor, row, torch.tensor([1]), image)


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("MCIC_BACKEND", "nope")
    with pytest.raises(ValueError, match="unknown backend 'nope'"):
        class_pool(*pool_case(), threshold=0.5)
