"""What only a GPU can show: accuracy and repeatability at real sizes, no waiting, graphs, large tensors."""

import copy

import pytest
import torch
from conftest import relative_error
from mcic.kernels import class_pool, ring_push_, sparse_attention

from mcic.config import MethodConfig
from mcic.data import Batch
from mcic.model import MCIC, NetworkSpec
from mcic.objective import Objective
from mcic.optim import build_optimizer
from mcic.update import GraphedUpdate, Update

pytestmark = pytest.mark.gpu

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def c1(dtype=BF16, *, batch=16, pixels=41 * 41, channels=1024, classes=21, slots=64, read=3, device="cuda"):
    """DESIGN's case C1: a full bank, `read` classes per image, scores of a trained model's spread."""
    make = {"device": device, "dtype": dtype}
    query = torch.randn(batch, pixels, channels, **make)
    keys = torch.randn(classes, slots, channels, **make)
    values = torch.randn(classes, slots, channels, **make)
    bias = torch.randn(classes, slots, device=device)
    counts = torch.full((classes,), slots, dtype=torch.int32, device=device)
    class_mask = torch.zeros(batch, classes, dtype=torch.bool, device=device)
    class_mask[:, 0] = True
    for image in range(batch):
        class_mask[image, 1 + torch.randperm(classes - 1)[: read - 1]] = True
    return query, keys, values, bias, counts, class_mask


def gradients(function, inputs, settled=1):
    """(message, entropy, gradients of a random projection of both), messages times `settled`, 0 or 1 [B, N, 1]."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    message, entropy = function(*inputs)
    message = message * settled
    torch.manual_seed(1)
    weight, share = torch.randn_like(message, dtype=F32), torch.randn_like(entropy, dtype=F32)
    loss = (message * weight.to(message.dtype)).sum() + (entropy * share.to(entropy.dtype)).sum()
    return message, entropy, *torch.autograd.grad(loss, inputs)


def plain_attention(query, keys, values, bias, counts, class_mask, *, scale, threshold):
    """E7–E9 as one would write them in PyTorch, every product in the inputs' precision."""
    readable = class_mask.repeat_interleave(keys.shape[1], 1)[:, None]  # a full bank
    scores = (query @ keys.flatten(0, 1).T).float() * scale + bias.flatten()
    scores = scores.masked_fill(~readable, -torch.inf)
    log_dense = scores.log_softmax(-1)
    dense = log_dense.exp()
    entropy = -(dense * log_dense.masked_fill(~readable, 0)).sum(-1)
    keep = (dense >= threshold / readable.sum(-1, keepdim=True)) | (scores == scores.amax(-1, keepdim=True))
    sparse = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    return sparse.to(values.dtype) @ values.flatten(0, 1), entropy


def is_settled(query, keys, bias, class_mask, *, scale, threshold):
    """[B, N, 1]: whether no entry of the pixel is so close to the threshold that rounding to fp32 decides."""
    readable = class_mask.repeat_interleave(keys.shape[1], 1)[:, None]
    scores = query.double() @ keys.double().flatten(0, 1).T * scale + bias.double().flatten()
    dense = scores.masked_fill(~readable, -torch.inf).softmax(-1)
    near = readable & ((dense * readable.sum(-1, keepdim=True) - threshold).abs() < 1e-5 * threshold)
    return ~near.any(-1, keepdim=True)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("channels", [512, 1024, 2048])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_attention_is_as_accurate_as_pytorch(dtype, channels, threshold):
    query, keys, values, bias, counts, class_mask = c1(dtype, batch=4, channels=channels)
    options = {"scale": channels**-0.5, "threshold": threshold}
    settled = is_settled(query, keys, bias, class_mask, **options)
    assert settled.double().mean() > 0.98
    cases = {}
    for name, operation, compute in (
        ("exact", lambda *a, **k: sparse_attention(*a, **k, backend="reference"), F64),
        ("plain", plain_attention, dtype),
        ("fused", lambda *a, **k: sparse_attention(*a, **k, backend="triton"), dtype),
    ):
        inputs = [tensor.to(compute) for tensor in (query, keys, values)]
        inputs.append(bias.to(F64 if compute == F64 else F32))

        def function(query, keys, values, bias, operation=operation):
            return operation(query, keys, values, bias, counts, class_mask, **options)

        cases[name] = [tensor.double() for tensor in gradients(function, inputs, settled)]
    for place, (exact, plain, fused) in enumerate(zip(*cases.values(), strict=True)):
        norm = exact.norm()
        ours, theirs = ((fused - exact).norm() / norm).item(), ((plain - exact).norm() / norm).item()
        floor = torch.finfo(dtype).eps / 4
        assert ours <= (2 if place < 2 else 3) * max(theirs, floor), f"output {place}: {ours:.1e} against {theirs:.1e}"


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_operations_repeat_to_the_bit(dtype):
    query, keys, values, bias, counts, class_mask = c1(dtype, batch=4)
    features = torch.randn(4, 512, 41, 41, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    confidence = torch.randn(4, 21, 41, 41, device="cuda").mul(3).softmax(1)

    def attend(*tensors):
        return sparse_attention(*tensors, counts, class_mask, scale=0.03, threshold=1.0, backend="triton")

    def run():
        pooled = class_pool(features, confidence, class_mask, threshold=0.3, backend="triton")
        return *gradients(attend, (query, keys, values, bias)), *pooled

    first = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("slots", [64, 2048])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_row_never_loses_its_maximum(dtype, precision, slots):
    """A threshold that only the maximum passes, and scores small against their terms: every rounding counts."""
    query, keys, values, _, counts, class_mask = c1(dtype, batch=2, slots=slots)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        message, _ = sparse_attention(
            query, keys, values, None, counts, class_mask, scale=1.0, threshold=1e6, backend="triton"
        )
    finally:
        torch.set_float32_matmul_precision(before)
    assert message.float().norm(dim=-1).min() > 1


def test_attention_past_two_to_the_31_elements():
    query, keys, values, bias, counts, class_mask = c1(batch=2, pixels=1_060_000, read=2)
    assert query.numel() > 2**31
    message, _ = sparse_attention(query, keys, values, bias, counts, class_mask, scale=0.03, backend="triton")
    last = query[1:, -64:]
    expected, _ = sparse_attention(
        last.double(), keys.double(), values.double(), bias.double(), counts, class_mask[1:], scale=0.03,
        backend="reference",
    )  # fmt: skip
    assert relative_error(message[1:, -64:].double(), expected) < 1.6e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_that_of_the_tensors():
    case = c1(batch=2, device="cuda:1")
    with torch.cuda.device(0):
        message, _ = sparse_attention(*case, scale=0.03, backend="triton")
        expected, _ = sparse_attention(*case, scale=0.03, backend="reference")
    assert relative_error(message.double(), expected.double()) < 1.6e-2


def training(backend="auto", dtype=BF16, **changes):
    """A small model in training, one batch, and λ."""
    torch.manual_seed(0)
    method = MethodConfig(attention_threshold=1.0, **changes).resolved()
    spec = NetworkSpec("tiny", None, "linear", 6)
    model = MCIC(spec, slots=8, attention_threshold=1.0, pool_threshold=0.1, backend=backend)
    model = model.to("cuda", memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, lr=0.01, new_layer_lr=1.0, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    update = Update(model, Objective(method, backend=backend), optimizer, scaler, dtype=dtype)
    tags = torch.rand(4, 5, device="cuda") < 0.4
    batch = Batch(
        torch.randn(4, 3, 97, 97, device="cuda").to(memory_format=torch.channels_last),
        tags, torch.rand(4, 97, 97, device="cuda"), None, None,
        torch.ones(4, 97, 97, dtype=torch.bool, device="cuda"), torch.arange(4, device="cuda"),
    )  # fmt: skip
    return model, update, batch, torch.full((), 0.7, device="cuda")


@pytest.mark.parametrize(
    "method", [{}, {"refinement": "pamr"}, {"refinement": "pamr", "mask_upsampling": 4}], ids=["plain", "pamr", "fine"]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_never_waits_for_the_gpu(backend, method):
    _, update, batch, ramp = training(backend, **method)
    for _ in range(3):
        update(batch, ramp)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = update(batch, ramp)  # a wait raises
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures["loss/total"].isfinite()


@pytest.mark.parametrize("refinement", ["none", "pamr"])
def test_a_thousand_replays_equal_eager_steps(monkeypatch, refinement):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for graphed in (False, True):
        model, update, batch, ramp = training(refinement=refinement)
        step = GraphedUpdate(update) if graphed else update
        for number in range(1000):
            torch.manual_seed(number)
            figures = step(batch, ramp * (number / 1000))
        states.append(copy.deepcopy(model.state_dict()) | {"total": figures["loss/total"].clone()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_push_is_part_of_a_graph():
    bank, ids = torch.zeros(3, 4, 8, device="cuda"), torch.full((3, 4), -1, device="cuda")
    counts, cursor = torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    rows = torch.randn(5, 8, device="cuda")
    labels = torch.tensor([0, 1, 0, -1, 2], dtype=torch.int32, device="cuda")
    images = torch.arange(5, device="cuda")
    state = (bank, ids, counts, cursor)
    ring_push_(*state, rows, labels, images)
    expected = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring_push_(*state, rows, labels, images)
    for _ in range(7):
        rows.normal_()
        graph.replay()
        ring_push_(*expected, rows, labels, images, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
