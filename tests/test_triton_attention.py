"""The attention in Triton against the fp64 reference: values, every gradient, every regime, every edge."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TOLERANCE, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcic.kernels import sparse_attention
from mcic.kernels.sparse_attention.reference import attention_weights

pytest.importorskip("triton")
from mcic.kernels.sparse_attention.rows import STEPS, row_limit
from mcic.kernels.sparse_attention.triton import sparse_attention_bwd, sparse_attention_fwd

NAMES = ("query", "keys", "values", "bias")
READS = [(), (0,), (1,), (0, 1), (1, 2), (0, 1, 2), (2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3), (4,)]
"""classes of each image: with the counts 1, t, t/2, 3t/2, 0 (t the row kernels' step) the images read 0, 1, t, t + 1,
3t/2, 3t/2 + 1, 2t, 2t + 1, 3t entries in the row kernels, 3t + 1 in the streaming ones, and one reads an empty class"""


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or -99, so that an element that no kernel writes shows."""

    def spoiling(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -99)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, spoiling(getattr(owner, name)))


def spoilt(*shape, device, dtype):
    """Random numbers, as a view in the middle of NaN."""
    around = torch.full([size + 3 for size in shape], torch.nan, device=device, dtype=dtype)
    view = around[tuple(slice(1, 1 + size) for size in shape)]
    return view.copy_(torch.randn(shape, device=device))


def attention_case(
    device, *, reads=READS, counts=None, dtype=torch.float32, heads=None, pixels=3, channels=48, out=16, slots=None
):
    """Inputs of the attention, with NaN around the query and in every slot that holds nothing."""
    step = row_limit(device, dtype) // STEPS.value
    counts = [1, step, step // 2, step + step // 2, 0] if counts is None else counts
    slots = max(counts) if slots is None else slots
    lead = () if heads is None else (heads,)
    stored = torch.arange(slots) < torch.tensor(counts)[:, None]

    def bank(*width):
        full = torch.randn(*lead, len(counts), slots, *width)
        empty = ~stored if not width else ~stored[..., None]
        return full.masked_fill(empty, torch.nan).to(device, dtype)

    class_mask = torch.zeros(len(reads), len(counts), dtype=torch.bool)
    for image, classes in enumerate(reads):
        class_mask[image, list(classes)] = True
    return SimpleNamespace(
        query=spoilt(len(reads), pixels, channels, device=device, dtype=dtype),
        keys=bank(channels),
        values=bank(out),
        bias=bank(),
        counts=torch.tensor(counts, dtype=torch.int32, device=device),
        class_mask=class_mask.to(device),
    )


def settled(case, scale, threshold):
    """[B, N]: pixels none of whose weights lies within rounding (1e-5) of the threshold, nor of a maximum below it."""
    bank = (case.keys.double(), None if case.bias is None else case.bias.double(), case.counts, case.class_mask)
    dense = attention_weights(case.query.double(), *bank, scale=scale, threshold=0.0).flatten(3)  # [B, h, N, M]
    num = (torch.minimum(case.counts, torch.tensor(case.keys.shape[-2])) * case.class_mask).sum(1).clamp(min=1)
    cut = threshold / num.double()[:, None, None, None]
    best = dense.amax(-1, keepdim=True)
    near = (dense / cut.clamp(min=1e-300) - 1).abs() < 1e-5
    near |= (best < cut * (1 + 1e-5)) & (dense > best * (1 - 1e-5))
    near &= dense < best  # the maximum is always kept
    assert near.sum() <= 1e-3 * near.numel()
    return ~near.any(-1).any(1)


def run(case, *, scale, threshold, backend, double=False, wanted=NAMES, d_message=None, d_entropy=None):
    """message, entropy and the gradients asked for."""
    inputs = {name: getattr(case, name) for name in NAMES}
    if double:
        inputs = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted if inputs[name] is not None}
    inputs |= leaves
    message, entropy = sparse_attention(
        *inputs.values(), case.counts, case.class_mask, scale=scale, threshold=threshold, backend=backend
    )
    outputs = [(message, d_message), (entropy, d_entropy)]
    outputs = [(output, gradient.to(output.dtype)) for output, gradient in outputs if gradient is not None]
    outputs, incoming = zip(*outputs, strict=True) if outputs else ((), ())
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return {"message": message.detach(), "entropy": entropy.detach()} | dict(zip(leaves, gradients, strict=True))


def check(case, *, scale=0.3, threshold, wanted=NAMES, with_message=True, with_entropy=True):
    """The fused kernels agree with the fp64 reference on every settled pixel."""
    sure = settled(case, scale, threshold)
    options = {"scale": scale, "threshold": threshold, "wanted": wanted}
    if with_message:
        options["d_message"] = spoilt(*sure.shape, case.values.shape[-1], device=sure.device, dtype=case.query.dtype)
        options["d_message"].mul_(sure[..., None])
    if with_entropy:
        options["d_entropy"] = torch.randn(sure.shape, device=sure.device) * sure
    actual = run(case, backend="triton", **options)
    expected = run(case, backend="reference", double=True, **options)
    for name, exact in expected.items():
        value = actual[name]
        tolerance = TOLERANCE[case.query.dtype]
        assert value.shape == exact.shape
        if name in NAMES:
            tolerance *= 3
            assert value.dtype == getattr(case, name).dtype
        else:
            value, exact = value[sure], exact[sure]
        assert value.isfinite().all(), name
        if exact.numel():
            assert relative_error(value.double(), exact) <= tolerance, name
    return actual


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "heads", "threshold", "pixels"),
    [
        (torch.float32, None, 0.0, 3),
        (torch.float32, None, 1.0, 17),
        (torch.float32, 2, 0.5, 2),
        (torch.float16, None, 3.0, 3),
        (torch.float16, None, 0.0, 3),
        pytest.param(torch.bfloat16, None, 1.0, 300, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, 2, 0.0, 300, marks=pytest.mark.gpu),
    ],
)
def test_every_number_of_entries(device, dtype, heads, threshold, pixels):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter's bf16 products are wrong")
    actual = check(attention_case(device, dtype=dtype, heads=heads, pixels=pixels), threshold=threshold)
    for image in (0, len(READS) - 1):  # nothing to read
        assert not actual["message"][image].any()
        assert not actual["entropy"][image].any()
        assert not actual["query"][image].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("row_kernels", [True, False])
def test_each_gradient_alone(device, wanted, row_kernels):
    reads = [(0, 1), (1,)] if row_kernels else [(0, 1, 2, 3), (0,)]
    case = attention_case(device, reads=reads, pixels=5)
    check(case, threshold=1.0, wanted=(wanted,), with_entropy=wanted != "values")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("with_message", "with_entropy"), [(True, False), (False, True)])
def test_one_output_alone(device, with_message, with_entropy):
    case = attention_case(device, reads=[(0, 1), (0, 1, 2, 3)], pixels=5)
    wanted = NAMES if with_message else ("query", "keys", "bias")
    check(case, threshold=1.0, wanted=wanted, with_message=with_message, with_entropy=with_entropy)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("channels", "out", "pixels"), [(16, 16, 1), (33, 17, 2), pytest.param(2048, 512, 70, marks=pytest.mark.gpu)]
)
def test_sizes(device, channels, out, pixels):
    case = attention_case(device, reads=[(0, 1)], counts=[2, 3], pixels=pixels, channels=channels, out=out)
    check(case, threshold=0.5, scale=channels**-0.5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [None, 2])
def test_a_class_with_more_slots_than_a_row(device, dtype, heads):
    """No image is for the row kernels, and the bank's gradients are written in its own dtype."""
    counts = [row_limit(device, dtype) + 1, 3]
    case = attention_case(device, reads=[(0, 1), (1,)], counts=counts, dtype=dtype, heads=heads)
    check(case, threshold=0.5, scale=0.1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("empty", [{"reads": []}, {"pixels": 0}, {"counts": [0, 0], "slots": 2}])
def test_empty(device, empty):
    actual = check(attention_case(device, **({"reads": [(0, 1)], "counts": [2, 3]} | empty)), threshold=1.0)
    for name in ("keys", "values", "bias"):
        assert not actual[name].any()


@pytest.mark.usefixtures("poisoned")
def test_rows_that_nobody_reads_get_no_gradient(device):
    case = attention_case(device, reads=[(1,)], counts=[4, 3], slots=5)
    actual = check(case, threshold=1.0)
    for name in ("keys", "values", "bias"):
        assert not actual[name][0].any()
        assert not actual[name][1, 3:].any()
        assert actual[name][1, :3].any()


@pytest.mark.usefixtures("poisoned")
def test_without_a_bias(device):
    case = attention_case(device, reads=[(0, 1), (0, 1, 2, 3)], pixels=5)
    case.bias = None
    check(case, threshold=1.0)


@pytest.mark.usefixtures("poisoned")
def test_a_bank_in_another_dtype(device):
    """It is converted to the query's, and its gradients back; a row kernel reads the first image, a streaming one the
    second."""
    case = attention_case(device, dtype=torch.float16, reads=[(0, 1), (0, 1, 2, 3)], pixels=5)
    for name in ("keys", "values", "bias"):
        setattr(case, name, getattr(case, name).float())
    check(case, threshold=0.0)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_channels_first_query_and_expanded_gradients(device, threshold):
    case = attention_case(device, reads=[(0, 1), (0, 1, 2, 3)], pixels=6)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert case.query.stride(2) == 6
    sure = settled(case, 0.3, threshold)
    assert sure.all()
    results = []
    for backend, double in (("triton", False), ("reference", True)):
        leaves = [getattr(case, name).to(torch.float64 if double else torch.float32).requires_grad_() for name in NAMES]
        message, entropy = sparse_attention(
            *leaves, case.counts, case.class_mask, scale=0.3, threshold=threshold, backend=backend
        )
        results.append(torch.autograd.grad(message.sum() + entropy.mean(), leaves))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual.double(), expected) <= 3 * TOLERANCE[torch.float32]


def test_only_entries_at_the_threshold_may_flip(device):
    """With the identity as values the message is the attention itself."""
    case = attention_case(device, reads=[(0, 1), (0,)], counts=[12, 9], slots=12, pixels=40, out=24)
    case.values = torch.eye(24, device=device).view(2, 12, 24)
    message, _ = sparse_attention(
        case.query, case.keys, case.values, case.bias, case.counts, case.class_mask, scale=0.3, threshold=1.0,
        backend="triton",
    )  # fmt: skip
    exact = attention_weights(
        case.query.double(), case.keys.double(), case.bias.double(), case.counts, case.class_mask, scale=0.3,
        threshold=1.0,
    ).flatten(3)[:, 0]  # fmt: skip
    sure = settled(case, 0.3, 1.0)
    flipped = (message > 0) != (exact > 0)
    assert not flipped[sure].any()
    assert flipped.sum() <= 1e-3 * flipped.numel()
    assert (exact[0] > 0).sum(-1).float().mean() < 20  # the threshold drops some


def test_equal_scores_are_all_kept(device):
    case = attention_case(device, reads=[(0, 1)], counts=[4, 3], pixels=3)
    case.query, case.bias = torch.zeros_like(case.query), None
    mean = torch.cat([case.values[0, :4], case.values[1, :3]]).mean(0)
    for threshold in (1.0, 3.0):
        message, entropy = sparse_attention(
            case.query, case.keys, case.values, None, case.counts, case.class_mask, scale=1.0, threshold=threshold,
            backend="triton",
        )  # fmt: skip
        torch.testing.assert_close(message, mean.expand_as(message))
        torch.testing.assert_close(entropy, torch.full_like(entropy, 7.0).log())


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_shape(device, data):
    counts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4), label="counts")
    classes = st.sets(st.integers(0, len(counts) - 1))
    case = attention_case(
        device,
        reads=data.draw(st.lists(classes, max_size=3), label="reads"),
        counts=counts,
        slots=max([1, *counts]) + data.draw(st.integers(0, 1), label="unused slots"),
        heads=data.draw(st.sampled_from([None, 1, 3]), label="heads"),
        pixels=data.draw(st.integers(0, 20), label="pixels"),
        channels=data.draw(st.integers(1, 36), label="D"),
        out=data.draw(st.integers(1, 36), label="E"),
    )
    check(case, threshold=data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]), label="threshold"))


def test_repeats_are_identical(device):
    case = attention_case(device, reads=[(0, 1), (0, 1, 2, 3)], pixels=5)
    options = {"d_message": torch.randn(2, 5, 16, device=device), "d_entropy": torch.randn(2, 5, device=device)}
    first, second = (run(case, scale=0.3, threshold=1.0, backend="triton", **options) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_nothing_is_kept_without_a_gradient(device):
    case = attention_case(device, reads=[(0, 1)], pixels=5)
    inputs = (case.query, case.keys[None], case.values[None], case.bias[None], case.counts, case.class_mask)
    _, _, *saved = sparse_attention_fwd(*inputs, 0.3, 1.0, False)
    assert not any(tensor.numel() for tensor in saved)


@pytest.mark.parametrize("save", [True, False])
def test_operators_keep_their_contract(device, save):
    case = attention_case(device, reads=[(0, 1), (0, 1)], counts=[8, 8], pixels=3)
    inputs = [case.query, case.keys[None], case.values[None], case.bias[None]]
    tensors = [tensor.detach().requires_grad_(save) for tensor in inputs]
    torch.library.opcheck(sparse_attention_fwd, (*tensors, case.counts, case.class_mask, 0.3, 1.0, save))
    if save:
        message, entropy, _, _, *kept = sparse_attention_fwd(*inputs, case.counts, case.class_mask, 0.3, 1.0, True)
        arguments = (*inputs, case.counts, case.class_mask, message, entropy, *kept, torch.randn_like(message))
        for wants in ([True] * 4, [False, True, False, True]):
            torch.library.opcheck(sparse_attention_bwd, (*arguments, torch.randn_like(entropy), 0.3, 1.0, wants))


@pytest.mark.parametrize("heads", [None, 2])
def test_compiles_into_one_graph(device, heads):
    case = attention_case(device, reads=[(0, 1)], counts=[2, 3], heads=heads)

    def step(*leaves):
        message, entropy = sparse_attention(
            *leaves, case.counts, case.class_mask, scale=0.3, threshold=1.0, backend="triton"
        )
        return message.square().sum() + entropy.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [getattr(case, name).detach().clone().requires_grad_() for name in NAMES]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)
