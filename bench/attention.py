"""The attention: operation and layer, forward and backward, and what else could compute it.

The operation gets keys, values and an all-zero bias, so that the published form, which has no bias, computes the same
function; fused and reference compute the bias's gradient all the same. The layer gets features and the raw bank and
returns W_o m + b_o and the entropy; its backward pass ends in the gradients of the four projections. Pulling the rows
of the batch's classes out of the bank is part of every baseline that needs it.

SDPA and FlexAttention compute no entropy and no threshold: less work than ours, in their favour. SDPA runs over the
batch-wide union under a mask, and once more over each image's own rows, gathered: that form needs as many classes in
every image, which a real batch does not have. For both the host reads which classes there are beforehand, which is not
counted either, so that they can be replayed as CUDA graphs as our form is. The published forward pass reads that in
every call, and so has no graph; its backward pass has one, but for the compiled layer, whose parameters belong to the
stream that it was first built on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from mcic.kernels import sparse_attention
from torch import Tensor

from bench import counts as work
from bench.cases import CONTEXTS, DETAILED, ContextCase
from bench.engine import Named, Task, Variant, compiled_here, fastest
from bench.published import PublishedPropagation
from mcic.model.propagation import Propagation

LARGEST_DENSE = 2**30
"""scores that a dense form may make: 4 GiB in fp32, and what is kept for the backward pass is some eight times that,
so that about two such forms fit on a card of 80 GiB"""


@dataclass(frozen=True)
class AttentionInputs:
    """query [B, N, D], keys and values [K, S, D], bias [K, S], counts, class_mask, dmessage [B, N, D], dentropy
    [B, N], entries f32 [K, S, D]."""

    query: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    counts: Tensor
    class_mask: Tensor
    grad_message: Tensor
    grad_entropy: Tensor

    @classmethod
    def make(cls, case: ContextCase, device: torch.device, dtype: torch.dtype) -> AttentionInputs:
        """Random, with a full bank; drawn on the device, as large banks would take minutes on the host."""
        make = {"device": device, "dtype": dtype}
        pixels = (case.batch, case.side**2)
        bank = (case.classes, case.slots, case.channels)
        return cls(
            query=torch.randn(*pixels, case.channels, **make),
            keys=torch.randn(bank, **make),
            values=torch.randn(bank, **make),
            bias=torch.zeros(bank[:2], **make),
            counts=torch.full((case.classes,), case.slots, dtype=torch.int32, device=device),
            class_mask=case.class_mask().to(device),
            grad_message=torch.randn(*pixels, case.channels, **make),
            grad_entropy=torch.randn(pixels, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )

    def upcast(self) -> AttentionInputs:
        """The same numbers in fp32."""
        floating = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: v.float() for k, v in floating.items() if v.is_floating_point()})


Forward = Callable[[AttentionInputs], Named]


def kernel(backend: str, case: ContextCase) -> Forward:
    """Our operation on a backend; `fused`: the fastest, which must not be the reference."""

    def forward(x: AttentionInputs) -> Named:
        message, entropy = sparse_attention(
            x.query, x.keys, x.values, x.bias, x.counts, x.class_mask,
            scale=case.channels**-0.5, threshold=case.threshold, backend=backend,
        )  # fmt: skip
        return {"message": message, "entropy": entropy}

    return forward


def published(case: ContextCase, *, compiled: bool) -> Forward:
    """The published attention on projected pixels and rows: union, expansion, mask, dense scores."""
    layer = PublishedPropagation(1, threshold=case.threshold)
    attend = torch.compile(layer.attend, dynamic=False) if compiled else layer.attend

    def forward(x: AttentionInputs) -> Named:
        keys, values, hidden = union(x, present(x))
        message, entropy = attend(x.query.transpose(0, 1), expand(keys, x), expand(values, x), hidden)
        return {"message": message.transpose(0, 1), "entropy": entropy}

    return forward


def present(x: AttentionInputs) -> Tensor:
    """The classes that any image has, int64; a host read."""
    return x.class_mask.any(0).nonzero().flatten()


def union(x: AttentionInputs, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [M, D] of the classes, and what each image may not read of them, [B, M]."""
    hidden = ~x.class_mask[:, classes].repeat_interleave(x.keys.shape[1], 1)
    return x.keys[classes].flatten(0, 1), x.values[classes].flatten(0, 1), hidden


def expand(rows: Tensor, x: AttentionInputs) -> Tensor:
    """[M, D] → [M, B, D], nothing copied."""
    return rows[:, None].expand(-1, len(x.query), -1)


def sdpa(made: AttentionInputs) -> Forward:
    """PyTorch's attention over the union, masked."""
    classes = present(made)

    def forward(x: AttentionInputs) -> Named:
        keys, values, hidden = union(x, classes)
        heads = [t[None, None].expand(len(x.query), -1, -1, -1) for t in (keys, values)]
        mask = ~hidden[:, None, None].expand(-1, -1, x.query.shape[1], -1)
        return {"message": F.scaled_dot_product_attention(x.query[:, None], *heads, attn_mask=mask)[:, 0]}

    return forward


def sdpa_gathered(made: AttentionInputs) -> Forward:
    """PyTorch's attention over each image's own rows, copied out of the bank."""
    own = made.class_mask.nonzero()[:, 1].view(len(made.query), -1)  # [B, classes of an image]

    def forward(x: AttentionInputs) -> Named:
        keys, values = (t[own].flatten(1, 2)[:, None] for t in (x.keys, x.values))
        return {"message": F.scaled_dot_product_attention(x.query[:, None], keys, values)[:, 0]}

    return forward


def flex(case: ContextCase, made: AttentionInputs) -> Forward:
    """FlexAttention over the whole bank; its block mask skips the classes that an image does not read.

    Making the block mask, which a training step would do for every batch, is not counted.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def readable(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return made.class_mask[b, kv // case.slots] & (kv % case.slots < made.counts[kv // case.slots])

    rows, device = case.classes * case.slots, made.query.device
    mask = create_block_mask(readable, case.batch, None, case.side**2, rows, device=device)

    def forward(x: AttentionInputs) -> Named:
        heads = [t.flatten(0, 1)[None, None].expand(len(x.query), -1, -1, -1) for t in (x.keys, x.values)]
        return {"message": compiled(x.query[:, None], *heads, block_mask=mask)[:, 0]}

    return forward


def forward_runner(forward: Forward, x: AttentionInputs) -> Callable[[], Named]:
    """Forward as in training: what the backward pass needs is kept."""
    x = differentiable(x)
    return lambda: {name: tensor.detach() for name, tensor in forward(x).items()}


def backward_runner(forward: Forward, x: AttentionInputs, *, query: bool) -> Callable[[], Named]:
    """The backward pass alone, over and over on one forward pass."""
    x = differentiable(x, query=query)
    results = forward(x)
    gradients = {"message": x.grad_message, "entropy": x.grad_entropy}
    names = ["keys", "values", *(["bias"] if "entropy" in results else []), *(["query"] if query else [])]
    inputs = [getattr(x, name) for name in names]
    outputs = list(results.values())
    incoming = [gradients[name].to(result.dtype) for name, result in results.items()]

    def run() -> Named:
        found = torch.autograd.grad(outputs, inputs, incoming, retain_graph=True, allow_unused=True)
        kept = {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}
        # Without the entropy's gradient only dvalues is comparable with ours.
        return (
            kept if "entropy" in results else {f"{k} (no entropy)" if k != "values" else k: v for k, v in kept.items()}
        )

    return run


def differentiable(x: AttentionInputs, *, query: bool = False) -> AttentionInputs:
    """The inputs as leaves of which keys, values, bias and perhaps the query want a gradient."""
    wanted = ["keys", "values", "bias", *(["query"] if query else [])]
    return dataclasses.replace(x, **{name: getattr(x, name).detach().requires_grad_() for name in wanted})


def fits(scores: int) -> bool:
    """True where a dense form may make so many scores; raises ValueError where they are too many."""
    if scores > LARGEST_DENSE:
        raise ValueError(f"left out: {scores:.2g} dense scores, of which at most {LARGEST_DENSE:.2g} are made")
    return True


def operation_tasks(name: str, case: ContextCase, device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """Forward, backward and backward with the query's gradient of one case."""
    x = AttentionInputs.make(case, device, dtype)
    size = work.AttentionSize.of(x.query, x.keys, x.values, x.counts, x.class_mask)
    whole, part = size.pixels * size.bank_rows, size.pixels * size.rows
    compiled = cache(lambda: compiled_here(device, name) and fits(part) and published(case, compiled=True))
    flexible = cache(lambda: compiled_here(device, name) and flex(case, x))
    forms: dict[str, Callable[[], Forward]] = {
        "fused": lambda: fastest("sparse_attention", x.query) and kernel("auto", case),
        "published": lambda: fits(part) and published(case, compiled=False),
        "published, compiled": compiled,
        "reference": lambda: fits(whole) and kernel("reference", case),
    }
    if case.threshold == 0:
        forms |= {
            "SDPA, masked union": lambda: fits(part) and sdpa(x),
            "SDPA, gathered": lambda: sdpa_gathered(x),
            "FlexAttention": flexible,
        }

    reads_host = ("published", "published, compiled")

    def task(step: str, cost: work.Cost, runner: Callable[[Forward, AttentionInputs], Callable[[], Named]]) -> Task:
        return Task(
            name="sparse_attention", case=f"{name} ({case.describe()})", scope="op", work=step, dtype=dtype, cost=cost,
            variants={
                k: Variant(lambda form=form: runner(form(), x), graph=step != "forward" or k not in reads_host)
                for k, form in forms.items()
            },
            expected=(lambda: runner(kernel("reference", case), x.upcast())()) if whole <= LARGEST_DENSE else None,
            detailed=name in DETAILED,
        )  # fmt: skip

    yield task("forward", work.attention_forward(size), forward_runner)
    for query in (False, True):
        step = "backward, with dquery" if query else "backward"
        yield task(
            step, work.attention_backward(size, query_gradient=query),
            lambda form, x, query=query: backward_runner(form, x, query=query),
        )  # fmt: skip


def skipping_task(device: torch.device, dtype: torch.dtype, case: ContextCase) -> Task:
    """Two of K classes against a bank that holds only those two."""
    case = dataclasses.replace(case, objects=1)
    x = AttentionInputs.make(case, device, dtype)
    x.class_mask[:] = False
    x.class_mask[:, [0, case.classes // 2]] = True
    pair = x.class_mask[0].nonzero().flatten()
    few = dataclasses.replace(
        x, keys=x.keys[pair], values=x.values[pair], bias=x.bias[pair], counts=x.counts[pair],
        class_mask=x.class_mask[:, pair].contiguous(),
    )  # fmt: skip

    def variant(inputs: AttentionInputs) -> Variant:
        return Variant(
            lambda: fastest("sparse_attention", x.query) and forward_runner(kernel("auto", case), inputs), graph=True
        )

    size = work.AttentionSize.of(x.query, x.keys, x.values, x.counts, x.class_mask)
    return Task(
        name="class skipping", case=f"2 of {case.classes} classes ({case.describe()})", scope="op", work="forward",
        dtype=dtype, cost=work.attention_forward(size),
        variants={f"fused, bank of {case.classes}": variant(x), "fused, bank of 2": variant(few)},
        expected=lambda: forward_runner(kernel("reference", case), x.upcast())(), baseline="fused, bank of 2",
    )  # fmt: skip


def layer_tasks(name: str, case: ContextCase, device: torch.device, dtype: torch.dtype) -> Iterator[Task]:
    """The layer of one case, forward and backward; the bank is f32 as in training."""
    x = AttentionInputs.make(case, device, dtype)
    entries = x.keys.float()
    size = work.AttentionSize.of(x.query, x.keys, x.values, x.counts, x.class_mask)
    torch.manual_seed(0)
    made = PublishedPropagation(case.channels, threshold=case.threshold).to(device, dtype)
    weights = made.state_dict()

    def ours(backend: str, dtype: torch.dtype = dtype) -> Callable[[], Named]:
        layer = Propagation(case.channels, threshold=case.threshold, backend=backend).to(device, dtype)
        layer.load_state_dict(weights)
        query = x.query.to(dtype)
        return lambda: (layer, layer.message(query, entries, x.counts, x.class_mask))

    def theirs(*, once: bool = False, compiled: bool = False) -> Callable[[], Named]:
        layer = PublishedPropagation(case.channels, threshold=case.threshold, project_once=once).to(device, dtype)
        layer.load_state_dict(weights)
        message = torch.compile(layer.message, dynamic=False) if compiled else layer.message

        def forward() -> object:
            present = x.class_mask.any(0).nonzero().flatten()
            hidden = ~x.class_mask[:, present].repeat_interleave(case.slots, 1)
            out, entropy = message(x.query.transpose(0, 1), entries[present].flatten(0, 1), hidden)
            return layer, (out.transpose(0, 1), entropy)

        return forward

    whole, part = size.pixels * size.bank_rows, size.pixels * size.rows
    forms = {
        "fused": lambda: fastest("sparse_attention", x.query) and ours("auto"),
        "published": lambda: fits(part) and theirs(),
        "published, compiled": cache(lambda: compiled_here(device, name) and fits(part) and theirs(compiled=True)),
        "published, projected once": lambda: fits(part) and theirs(once=True),
        "reference": lambda: fits(whole) and ours("reference"),
    }
    as_graph = {"forward": ("fused", "reference"), "backward": tuple(set(forms) - {"published, compiled"})}
    cost = back = None  # the counts are of projecting the bank, which is not the least where that is the larger side
    if size.rows <= size.pixels:
        cost = work.attention_forward(size) + work.projections_forward(size)
        back = work.attention_backward(size, query_gradient=False) + work.projections_backward(size)
    for step, amount, runner in (("forward", cost, layer_forward), ("backward", back, layer_backward)):
        yield Task(
            name="propagation layer", case=f"{name} ({case.describe()})", scope="layer", work=step, dtype=dtype,
            cost=amount,
            variants={
                k: Variant(lambda form=form, runner=runner: runner(form(), x), graph=k in as_graph[step])
                for k, form in forms.items()
            },
            expected=(lambda runner=runner: runner(ours("reference", torch.float32), x.upcast())())
            if whole <= LARGEST_DENSE else None,
            detailed=name in DETAILED,
        )  # fmt: skip


def layer_forward(forward: Callable[[], tuple], _: AttentionInputs) -> Callable[[], Named]:
    """Forward with everything kept for the backward pass."""

    def run() -> Named:
        _, (message, entropy) = forward()
        return {"message": message.detach(), "entropy": entropy.detach()}

    return run


def layer_backward(forward: Callable[[], tuple], x: AttentionInputs) -> Callable[[], Named]:
    """Gradients of the projections' parameters, over and over on one forward pass."""
    layer, (message, entropy) = forward()
    # The key's bias shifts all scores of a row alike: its gradient is 0 but for rounding.
    parameters = {k: v for k, v in layer.named_parameters() if "norm" not in k and k != "key.bias"}
    incoming = [x.grad_message.to(message.dtype), x.grad_entropy.to(entropy.dtype)]

    def run() -> Named:
        found = torch.autograd.grad([message, entropy], list(parameters.values()), incoming, retain_graph=True)
        return dict(zip(parameters, found, strict=True))

    return run


def tasks(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], Iterator[Task]]]:
    """Operation and layer of a case, thunks so that their tensors live no longer than they run."""
    case = CONTEXTS[name]
    yield lambda: operation_tasks(name, case, device, dtype)
    yield lambda: layer_tasks(name, case, device, dtype)
    yield lambda: operation_tasks(name, dataclasses.replace(case, threshold=1.0), device, dtype)
