"""The Triton kernels of `sparse_attention` for images that read many keys, against the fp64 reference."""

import pytest
import torch
from conftest import TOLERANCE, relative_error
from mcic.kernels import sparse_attention

pytest.importorskip("triton")

from mcic.kernels.sparse_attention.reference import attention_weights
from mcic.kernels.sparse_attention.streaming import streaming_forward
from mcic.kernels.sparse_attention.streaming_backward import streaming_backward

SCALE = 0.35
NAN = float("nan")
GRADIENTS = ("query", "keys", "values", "bias")

HALF = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, HALF]


class Case:
    """Inputs, what the kernels make of them, and the reference's answer in fp64.

    Two images: the first reads classes 0 and 2, the second classes 0 and 1; class 3 has entries that nobody reads.
    """

    def __init__(
        self, device, dtype=torch.float32, *, pixels=18, counts=(19, 0, 22, 5), slots=25, channels=20, out_channels=37,
        heads=1, bias=True, threshold=0.0, classes=((1, 0, 1, 0), (1, 1, 0, 0)),
    ):  # fmt: skip
        def randn(*shape, like=dtype):
            return torch.randn(shape).to(like).to(device)

        self.query = randn(2, pixels, channels)
        self.counts = torch.tensor(counts, dtype=torch.int32, device=device)
        self.class_mask = torch.tensor(classes, dtype=torch.bool, device=device)
        unread = torch.arange(slots, device=device) >= self.counts[:, None]
        self.keys = randn(heads, len(counts), slots, channels).masked_fill(unread[..., None], NAN)
        self.values = randn(heads, len(counts), slots, out_channels).masked_fill(unread[..., None], NAN)
        self.bias = randn(heads, len(counts), slots).masked_fill(unread, NAN) if bias else None
        self.d_message = randn(2, pixels, out_channels)
        self.d_entropy = randn(2, pixels, like=torch.float32)
        self.threshold = threshold

    def num_entries(self) -> list[int]:
        return (self.class_mask * self.counts).sum(1).tolist()

    def at_threshold(self) -> torch.Tensor:
        """Pixels [B, N] with an entry so close to the threshold that a rounding decides."""
        bias = None if self.bias is None else self.bias.double()
        dense = attention_weights(
            self.query.double(), self.keys.double(), bias, self.counts, self.class_mask, scale=SCALE, threshold=0
        )  # [B, heads, N, K, S]
        relative = dense * (self.class_mask * self.counts).sum(1)[:, None, None, None, None]
        return ((relative - self.threshold).abs() < 1e-5 * self.threshold).any(-1).any(-1).any(1)

    def reference(self) -> dict[str, torch.Tensor]:
        """Message, entropy and gradients in fp64."""
        inputs = {name: getattr(self, name) for name in GRADIENTS}
        leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
        message, entropy = sparse_attention(
            leaves["query"], leaves["keys"], leaves["values"], leaves.get("bias"), self.counts, self.class_mask,
            scale=SCALE, threshold=self.threshold, backend="reference",
        )  # fmt: skip
        torch.autograd.backward((message, entropy), (self.d_message.double(), self.d_entropy.double()))
        return {"message": message, "entropy": entropy} | {name: leaf.grad for name, leaf in leaves.items()}

    def forward(self, row_limit: int = -1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per-head message, entropy and statistics; what no kernel writes is NaN."""
        (heads, _, _, out_channels), (batch, pixels, _) = self.values.shape, self.query.shape
        per_head = self.query.dtype if heads == 1 else torch.float32
        message = self.query.new_full((heads, batch, pixels, out_channels), NAN, dtype=per_head)
        entropy = self.query.new_full((heads, batch, pixels), NAN, dtype=torch.float32)
        stats = self.query.new_full((3, heads, batch, pixels), NAN, dtype=torch.float32)
        totals = torch.full((batch,), -1, dtype=torch.int32, device=self.query.device)
        streaming_forward(
            self.query, self.keys, self.values, self.bias, self.counts, self.class_mask,
            scale=SCALE, threshold=self.threshold, row_limit=row_limit, message=message, entropy=entropy, stats=stats,
            totals=totals,
        )  # fmt: skip
        slots = self.counts.clamp(0, self.keys.shape[2])
        assert not message.numel() or torch.equal(totals, torch.where(self.class_mask, slots, 0).sum(1).int())
        return message, entropy, stats, totals

    def backward(self, saved, row_limit: int = -1, wanted=GRADIENTS, filled: float = 0.0) -> dict[str, torch.Tensor]:
        """Gradients; those of the bank are added to `filled`."""
        heads = self.keys.shape[0]
        per_head = self.query.dtype if heads == 1 else torch.float32
        gradients = {
            "query": self.query.new_full((heads, *self.query.shape), NAN, dtype=per_head),
            "keys": self.keys.new_full(self.keys.shape, filled, dtype=torch.float32),
            "values": self.values.new_full(self.values.shape, filled, dtype=torch.float32),
            "bias": None if self.bias is None else self.bias.new_full(self.bias.shape, filled, dtype=torch.float32),
        }
        gradients = {name: gradient for name, gradient in gradients.items() if name in wanted}
        streaming_backward(
            self.query, self.keys, self.values, self.bias, self.counts, self.class_mask, *saved,
            self.d_message, self.d_entropy / heads, scale=SCALE, threshold=self.threshold, row_limit=row_limit,
            **{f"d_{name}": gradients.get(name) for name in GRADIENTS},
        )  # fmt: skip
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def run(self) -> dict[str, torch.Tensor]:
        """What the operation gives: heads summed, their entropies averaged."""
        message, entropy, stats, totals = self.forward()
        assert stats.isfinite().all()
        gradients = self.backward((message, entropy, stats, totals))
        gradients["query"] = gradients["query"].sum(0)
        return {"message": message.sum(0), "entropy": entropy.mean(0)} | gradients

    def check(self) -> None:
        """Values and gradients within tolerance; where an entry is at the threshold, message and its gradient are 0."""
        band = self.at_threshold()
        assert band.double().mean() <= 2e-2  # in what is compared instead there is enough left
        self.d_message = self.d_message.masked_fill(band[..., None], 0)
        expected, actual = self.reference(), self.run()
        for message in (expected, actual):
            message["message"] = message["message"].masked_fill(band[..., None], 0)
        assert_close(actual, expected, self.query.dtype)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, value in actual.items():
        assert value.isfinite().all(), name
        bound = TOLERANCE[dtype] * (3 if name in GRADIENTS else 1)
        error = relative_error(value.double(), expected[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 3.0])
def test_values_and_gradients(device, dtype, threshold):
    Case(device, dtype, threshold=threshold).check()


SHAPES = {
    "one pixel": {"pixels": 1, "bias": False},
    "two entries": {"pixels": 3, "counts": (1, 1, 1, 0), "slots": 1},
    "few channels": {"pixels": 7, "channels": 3, "out_channels": 1},
    "whole blocks": {"pixels": 16, "channels": 32, "out_channels": 32, "counts": (32, 16, 16, 32), "slots": 32},
    "wide": {"pixels": 5, "channels": 70, "out_channels": 80},
    "wide, dense": {"pixels": 5, "channels": 50, "threshold": 0.0},
    "heads": {"pixels": 6, "heads": 2},
    "heads, dense": {"pixels": 6, "heads": 2, "threshold": 0.0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device, shape):
    Case(device, **{"threshold": 0.7} | SHAPES[shape]).check()


def test_many_classes(device):
    classes = ((0, 1) * 64 + (0, 1), (0,) * 128 + (1, 1))
    case = Case(device, counts=(3,) * 130, slots=3, classes=classes, pixels=4, channels=8, out_channels=8)
    expected, (message, entropy, *_) = case.reference(), case.forward()
    assert_close({"message": message[0], "entropy": entropy[0]}, expected, torch.float32)


def test_support_over_many_pixels(device):
    case = Case(device, threshold=1.0, pixels=500, counts=(19, 30, 5, 0), slots=30, channels=8, out_channels=4)
    band = case.at_threshold()
    assert band.double().mean() <= 1e-3
    message, _, stats, _ = case.forward()
    expected = case.reference()["message"].masked_fill(band[..., None], 0)
    assert_close({"message": message[0].masked_fill(band[..., None], 0)}, {"message": expected}, torch.float32)
    assert (stats[2, 0] > 1).any()  # something was dropped


def test_image_that_reads_nothing(device):
    case = Case(device, classes=((0, 1, 0, 0), (1, 0, 1, 0)), pixels=3)
    assert case.num_entries() == [0, 41]
    for threshold in (0.0, 1.0):
        case.threshold = threshold
        case.check()
        actual = case.run()
        for name in ("message", "entropy", "query"):
            assert not actual[name][0].any()
            assert actual[name][1].any()


def test_images_below_the_limit_are_left_alone(device):
    case = Case(device, threshold=1.0, pixels=10)
    assert case.num_entries() == [41, 19]
    saved = case.forward(row_limit=19)
    gradients = case.backward(saved, row_limit=19)
    for tensor in (saved[0][0, 1], saved[1][0, 1], saved[2][:, 0, 1], gradients["query"][0, 1]):
        assert tensor.isnan().all()

    case.class_mask[1] = False
    expected = case.reference()
    of_first = {"message": saved[0][0, 0], "entropy": saved[1][0, 0], "query": gradients["query"][0, 0]}
    assert_close(of_first, {name: expected[name][0] for name in of_first}, torch.float32)
    assert_close({name: gradients[name] for name in GRADIENTS[1:]}, expected, torch.float32)


def test_strides(device):
    case = Case(device, threshold=1.0, pixels=18)
    batch, pixels, channels = case.query.shape
    case.query = case.query.mT.contiguous().mT  # features [B, D, H, W]
    assert case.query.stride() == (channels * pixels, 1, pixels)
    case.d_message = case.d_message[:, :1, ::2].repeat_interleave(2, -1)[..., :-1].expand(-1, pixels, -1)
    case.d_entropy = torch.randn(1, 1, device=device).expand(batch, pixels)
    case.check()
    wide = torch.randn(pixels, batch, 3 * channels, device=device)
    case.query = wide.transpose(0, 1)[..., ::3]
    case.d_message = torch.randn(37, pixels, batch, device=device).permute(2, 1, 0)
    case.d_entropy = torch.randn(pixels, batch, device=device).mT
    case.check()


def test_gradients_of_the_bank_are_added(device):
    case = Case(device, threshold=1.0, pixels=5)
    saved = case.forward()
    added, expected = case.backward(saved, filled=1.0), case.backward(saved)
    unread = torch.arange(25, device=device) >= case.counts[:, None]
    unread[3] = True
    for name in GRADIENTS[1:]:
        torch.testing.assert_close(added[name], expected[name] + 1, rtol=1e-5, atol=1e-5)
        assert (added[name][:, unread] == 1).all()


def test_only_what_is_wanted(device):
    case = Case(device, threshold=1.0, pixels=3, channels=40)
    saved = case.forward()
    expected = case.backward(saved)
    for wanted in (("query",), ("keys",), ("values",), ("bias",), ()):
        gradients = case.backward(saved, wanted=wanted)
        assert gradients.keys() == set(wanted)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_repeats_are_identical(device, threshold):
    case = Case(device, threshold=threshold, pixels=3)
    first, second = case.run(), case.run()
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_empty(device):
    for sizes in ({"pixels": 0}, {"pixels": 3, "counts": (0, 0, 0, 0), "slots": 0}):
        actual = Case(device, threshold=1.0, **sizes).run()
        assert not any(value.any() for value in actual.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize(("channels", "out_channels"), [(512, 512), (2048, 1024), (100, 300)])
def test_shipped_blocks(dtype, threshold, channels, out_channels):
    case = Case(
        torch.device("cuda"), dtype, pixels=300, counts=(700, 0, 900, 10), slots=1000, channels=channels,
        out_channels=out_channels, threshold=threshold,
    )  # fmt: skip
    case.query *= (8 / channels) ** 0.5
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_memory_of_a_pixel_level_bank(threshold):
    device, dtype = torch.device("cuda"), torch.bfloat16
    keys, values = torch.randn(2, 81, 4096, 512, device=device, dtype=dtype).unbind()
    counts = torch.full((81,), 4096, device=device, dtype=torch.int32)
    class_mask = torch.zeros(16, 81, device=device, dtype=torch.bool)
    class_mask[:, :4] = True
    query, d_message = torch.randn(2, 16, 53 * 53, 512, device=device, dtype=dtype).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query.detach(), keys, values)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    message, entropy = sparse_attention(
        *leaves, None, counts, class_mask, scale=512**-0.5, threshold=threshold, backend="triton"
    )
    gradients = torch.autograd.grad((message, entropy), leaves, (d_message, torch.ones_like(entropy)))
    results = (message, entropy, *gradients)
    assert all(result.isfinite().all() for result in results)
    extra = torch.cuda.max_memory_allocated() - before - sum(result.nbytes for result in results)
    assert extra < 2**30
