"""The fused segmentation losses against plain cross-entropy in fp64: values and every gradient."""

import dataclasses

import pytest
import torch
from conftest import TOLERANCE, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcic.kernels import segmentation_losses
from torch.nn import functional as F

from mcic.config import MethodConfig
from mcic.model import Augmented, Prediction
from mcic.objective import Masks, Objective
from mcic.pseudo import IGNORE

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
COUNTS = (None, torch.tensor([7, 0, 400, 0, 0, 0])[::2])  # a strided one


def make(*, maps=2, masks=3, batch=2, classes=6, height=9, width=11, dtype=torch.float32, device="cpu"):
    """Logits of one or two maps, masks with a third of their pixels ignored, and weights of the losses [P, M]."""
    logits = [(torch.randn(batch, classes, height, width) * 2).to(device, dtype) for _ in range(maps)]
    labels = torch.randint(0, classes, (masks, batch, height, width), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    return logits, labels.to(device), torch.randn(maps, masks).to(device)


def differentiate(logits, masks, weights, counts=None, *, backend="triton"):
    """Losses [P, M] and the gradients of their weighted sum in the maps."""
    leaves = [maps.detach().requires_grad_() for maps in logits]
    first, second = (*leaves, None)[:2]
    counts = None if counts is None else counts[: len(masks)].to(masks.device)
    losses = segmentation_losses(first, second, masks, counts=counts, backend=backend)
    gradients = torch.autograd.grad((losses * weights.to(losses.dtype)).sum(), leaves)
    return losses.detach(), gradients


def assert_close(logits, masks, weights, counts=None, *, tiny=False):
    """Fused values and gradients against the fp64 reference.

    `tiny`: of so few pixels or classes that a whole loss or gradient may cancel: errors are then relative to 1 nat
    and to the largest gradient that a pixel can have.
    """

    def error(actual, expected, scale):
        scale = torch.full((1,), scale if tiny else 0.0, dtype=torch.float64, device=actual.device)
        return relative_error(torch.cat([actual.flatten().double(), scale]), torch.cat([expected.flatten(), scale]))

    losses, gradients = differentiate(logits, masks, weights, counts)
    exact = [maps.double() for maps in logits]
    expected, expected_gradients = differentiate(exact, masks, weights, counts, backend="reference")
    tolerance = TOLERANCE[logits[0].dtype]
    assert losses.dtype == torch.float32
    assert losses.shape == expected.shape == (len(logits), len(masks))
    assert error(losses, expected, 1.0) <= TOLERANCE[torch.float32]  # 16-bit logits are summed in fp32
    divisors = (masks != IGNORE).sum((1, 2, 3)).clamp(min=1)
    steepest = (weights.abs() / divisors).sum(1).max().item()
    for maps, gradient, exact_gradient in zip(logits, gradients, expected_gradients, strict=True):
        assert gradient.dtype == maps.dtype
        assert error(gradient, exact_gradient, steepest) <= 3 * tolerance
        labelled = (masks != IGNORE).any(0)[:, None]
        assert not gradient.masked_fill(labelled, 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("counts", COUNTS, ids=["own", "given"])
def test_values_and_gradients(device, dtype, maps, counts):
    assert_close(*make(maps=maps, dtype=dtype, device=device), counts)


@pytest.mark.parametrize(
    ("masks", "batch", "classes", "height", "width"),
    [(1, 1, 2, 1, 1), (2, 3, 1, 5, 3), (3, 1, 5, 1, 70), (1, 2, 21, 65, 1), (4, 1, 131, 2, 3), (1, 1, 255, 1, 2)],
)
def test_sizes(device, masks, batch, classes, height, width):
    case = make(masks=masks, batch=batch, classes=classes, height=height, width=width, device=device)
    assert_close(*case, tiny=True)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    maps=st.integers(1, 2),
    masks=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_any_shape(device, maps, masks, sizes, seed):
    torch.manual_seed(seed)
    keys = ("batch", "classes", "height", "width")
    assert_close(*make(maps=maps, masks=masks, device=device, **dict(zip(keys, sizes, strict=True))), tiny=True)


@pytest.mark.parametrize("size", [{"batch": 0}, {"width": 0}, {"masks": 0}])
@pytest.mark.parametrize("counts", COUNTS, ids=["own", "given"])
def test_nothing(device, size, counts):
    logits, masks, weights = make(device=device, **size)
    losses, gradients = differentiate(logits, masks, weights, counts)
    assert losses.shape == weights.shape
    assert not losses.any()
    for maps, gradient in zip(logits, gradients, strict=True):
        assert gradient.shape == maps.shape
        assert not gradient.any()


def test_sure_pixels_add_no_bias(device):
    """Gradients nearly cancel where the network agrees with its masks; their sums are as exact as the reference's."""
    labels = torch.randint(0, 6, (2, 17, 17), dtype=torch.uint8)
    sure = torch.randn(2, 6, 17, 17) + 9 * F.one_hot(labels.long(), 6).permute(0, 3, 1, 2)
    logits, masks, weights = [sure.to(device)], labels.expand(3, -1, -1, -1).contiguous().to(device), torch.ones(1, 3)

    def sums(maps, backend):
        return differentiate(maps, masks, weights.to(device), backend=backend)[1][0].double().sum((0, 2, 3))

    exact = sums([maps.double() for maps in logits], "reference")
    assert relative_error(sums(logits, "triton"), exact) <= 4 * relative_error(sums(logits, "reference"), exact)


def test_nothing_labelled_is_zero(device):
    logits, masks, weights = make(device=device)
    masks[1] = IGNORE
    losses, _ = differentiate(logits, masks, weights)
    assert (losses[:, 1] == 0).all()
    assert (losses[:, [0, 2]] != 0).all()
    losses, gradients = differentiate(logits, torch.full_like(masks, IGNORE), weights)
    assert not losses.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered")
def test_ignored_pixels_may_hold_anything(device):
    logits, masks, weights = make(device=device)
    ignored = (masks == IGNORE).all(0)[:, None].expand_as(logits[0])
    assert ignored.any()
    expected = differentiate(logits, masks, weights)
    for fill in (torch.nan, torch.inf, -torch.inf):
        losses, gradients = differentiate([maps.masked_fill(ignored, fill) for maps in logits], masks, weights)
        assert torch.equal(losses, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))


def test_large_logits(device):
    logits, masks, weights = make(device=device)
    assert_close([maps * 1e3 for maps in logits], masks, weights)
    assert_close([maps + 1e4 for maps in logits], masks, weights)


def test_labels_that_are_no_class_are_passed_over(device):
    logits, masks, weights = make(device=device)
    stray = masks.clone()
    stray[stray == IGNORE] = 6
    stray[0, 0, 0] = torch.where(stray[0, 0, 0] == 6, 254, stray[0, 0, 0])
    ours, theirs = differentiate(logits, stray, weights), differentiate(logits, masks, weights)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(device, dtype):
    """Channels-last, transposed, expanded and cut-out maps give what contiguous ones give, in the map's own order."""
    logits, masks, weights = make(height=10, width=10, dtype=dtype, device=device)
    losses, gradients = differentiate(logits, masks, weights)

    def check(logits, masks):
        found = differentiate(logits, masks, weights)
        torch.testing.assert_close(found[0], losses, rtol=1e-6, atol=0)  # the order of sums within a tile may differ
        for gradient, expected in zip(found[1], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-8)
        return found[1]

    last = [maps.contiguous(memory_format=torch.channels_last) for maps in logits]
    found = check(last, masks)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in found)
    check([logits[0], last[1]], masks.transpose(2, 3).contiguous().transpose(2, 3))
    check([maps.transpose(2, 3).contiguous().transpose(2, 3) for maps in logits], torch.stack([masks] * 2, -1)[..., 1])
    padded = [torch.full((2, 8, 12, 12), torch.nan, dtype=dtype, device=device) for _ in logits]
    for maps, room in zip(logits, padded, strict=True):
        room[:, 1:-1, 1:-1, 1:-1] = maps
    check([room[:, 1:-1, 1:-1, 1:-1] for room in padded], masks)


def test_expanded_maps_and_masks(device):
    logits, masks, weights = make(batch=1, masks=1, height=5, width=13, device=device)
    logits = [maps.expand(3, -1, -1, -1) for maps in logits]
    masks, weights = masks.expand(3, 3, -1, -1), weights.expand(2, 3)
    assert_close(logits, masks, weights)
    assert_close([maps[:, :, :1].expand(-1, -1, 5, -1) for maps in logits], masks, weights)


def test_incoming_gradients_of_any_stride(device):
    logits, masks, _ = make(device=device)
    leaves = [maps.requires_grad_() for maps in logits]
    losses = segmentation_losses(*leaves, masks, backend="triton")
    expanded = torch.ones((), device=device).expand(2, 3)
    transposed = torch.randn(3, 2, device=device).T
    strided = torch.randn(4, 6, device=device)[::2, ::2]
    for gradient in (expanded, transposed, strided):
        found = torch.autograd.grad(losses, leaves, gradient, retain_graph=True)
        expected = torch.autograd.grad(losses, leaves, gradient.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_close(leaves, masks, gradient)


def test_only_the_wanted_gradients(device):
    logits, masks, weights = make(device=device)
    _, expected = differentiate(logits, masks, weights)
    for wanted in (0, 1):
        maps = [tensor.detach().requires_grad_(p == wanted) for p, tensor in enumerate(logits)]
        losses = segmentation_losses(*maps, masks, backend="triton")
        (losses * weights).sum().backward()
        assert torch.equal(maps[wanted].grad, expected[wanted])
        assert maps[1 - wanted].grad is None


def test_maps_may_differ_in_dtype(device):
    logits, masks, weights = make(device=device)
    logits[1] = logits[1].half()
    losses, gradients = differentiate(logits, masks, weights)
    exact = [maps.double() for maps in logits]
    expected, expected_gradients = differentiate(exact, masks, weights, backend="reference")
    assert relative_error(losses, expected) <= TOLERANCE[torch.float32]
    for maps, gradient, exact_gradient in zip(logits, gradients, expected_gradients, strict=True):
        assert gradient.dtype == maps.dtype
        assert relative_error(gradient, exact_gradient) <= 3 * TOLERANCE[maps.dtype]


@pytest.mark.parametrize("maps", [1, 2])
def test_nothing_beyond_the_inputs_is_used(device, maps):
    """Inputs between NaNs and labels, outputs filled with NaN before they are written."""
    logits, masks, weights = make(maps=maps, height=7, width=9, device=device)

    def between(tensor):
        storage = torch.full((tensor.numel() + 2048,), torch.nan if tensor.is_floating_point() else 3)
        storage = storage.to(device, tensor.dtype)
        storage[1024:-1024] = tensor.flatten()
        return storage[1024:-1024].view(tensor.shape)

    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        assert_close([between(maps) for maps in logits], between(masks), between(weights))
    finally:
        torch.use_deterministic_algorithms(False)


def test_repeats_are_equal(device):
    case = make(device=device)
    losses, gradients = differentiate(*case)
    for _ in range(50 if device.type == "cuda" else 3):
        again, again_gradients = differentiate(*case)
        assert torch.equal(losses, again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again_gradients, strict=True))


@pytest.mark.parametrize("maps", [1, 2])
def test_opcheck(device, maps):
    for counts in (None, torch.tensor([5, 6, 7], device=device)):
        logits, masks, weights = make(maps=maps, height=3, width=4, device=device)
        differentiate(logits, masks, weights, counts)  # registers the operation
        logits = [tensor.contiguous(memory_format=torch.channels_last).requires_grad_() for tensor in logits]
        first, second = (*logits, None)[:2]
        torch.library.opcheck(torch.ops.mcic.segmentation_losses.default, (first, second, masks, counts))
        divisors, logits = torch.ones(3, device=device), [tensor.detach() for tensor in logits]
        backward = torch.ops.mcic.segmentation_losses_backward.default
        torch.library.opcheck(backward, (weights, logits, masks, divisors))


@pytest.mark.parametrize("maps", [1, 2])
def test_compiles_into_one_graph(device, maps):
    case = make(maps=maps, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in case[0]]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(first, second, masks, weights):
        return (segmentation_losses(first, second, masks, backend="triton") * weights).sum()

    function(*(*leaves, None)[:2], *case[1:]).backward()
    _, gradients = differentiate(*case)
    for leaf, expected in zip(leaves, gradients, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("counts", COUNTS, ids=["own", "given"])
def test_reference_is_cross_entropy(counts):
    logits, masks, _ = make(dtype=torch.float64)
    leaves = [maps.requires_grad_() for maps in logits]
    losses = segmentation_losses(*leaves, masks, counts=counts)
    for row, maps in zip(losses, logits, strict=True):
        for m, (loss, mask) in enumerate(zip(row, masks, strict=True)):
            expected = F.cross_entropy(maps, mask.long(), ignore_index=IGNORE, reduction="sum")
            divisor = (mask != IGNORE).sum() if counts is None else counts[m].clamp(min=1)
            torch.testing.assert_close(loss, expected / divisor)
    assert torch.autograd.gradcheck(lambda *maps: segmentation_losses(*maps, masks, counts=counts), leaves)


@pytest.mark.parametrize("chosen", [("cam", "context", "merged"), ("cam", "merged"), ("context",)])
@pytest.mark.parametrize("with_context", [True, False])
def test_objective(device, chosen, with_context):
    """Names, weights and masks of the terms, by hand; the same from both backends."""
    logits, masks, _ = make(device=device)
    method = dataclasses.replace(MethodConfig(rules="authors"), masks=chosen).resolved()
    ramp = torch.tensor(0.3, device=device)
    prediction = Prediction(logits[0], logits[0], logits[0])
    augmented = Augmented(logits[1], None, logits[1], logits[1]) if with_context else None
    branches = dict(zip("sc" if with_context else "s", logits, strict=False))
    names = dict(zip(("cam", "context", "merged"), masks.long(), strict=True))
    expected = {
        f"loss/{branch}_{name}": F.cross_entropy(maps, names[name], ignore_index=IGNORE)
        for name in chosen
        for branch, maps in branches.items()
    }
    total = sum(loss * (0.7 if name.endswith("cam") else 1) for name, loss in expected.items())
    for backend in ("triton", "reference"):
        found, terms = Objective(method, backend=backend)._segmentation(prediction, augmented, Masks(masks), ramp)
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.zeros(2, 6, 99)}, "logits must be floating point"),
        ({"logits": torch.zeros(2, 6, 9, 11, dtype=torch.int64)}, "logits must be floating point"),
        ({"logits": torch.zeros(2, 256, 9, 11), "context_logits": None}, "1 to 255 classes"),
        ({"context_logits": torch.zeros(2, 5, 9, 11)}, r"context_logits must be floating point \[2, 6, 9, 11\]"),
        ({"context_logits": torch.zeros(2, 6, 9, 11, dtype=torch.float64)}, "context_logits must be"),
        ({"masks": torch.zeros(2, 9, 11, dtype=torch.uint8)}, "masks must be uint8"),
        ({"masks": torch.zeros(3, 2, 9, 11)}, "masks must be uint8"),
        ({"counts": torch.ones(2)}, r"counts must be \[3\]"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
    ],
)
def test_names_what_does_not_fit(change, named):
    (logits, context_logits), masks, _ = make()
    arguments = {"logits": logits, "context_logits": context_logits, "masks": masks} | change
    with pytest.raises(ValueError, match=named):
        segmentation_losses(**arguments)
