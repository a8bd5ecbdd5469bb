"""The push in C++ and CUDA: slot arithmetic against a deque, bytes against the reference, its place in PyTorch."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcic.kernels import native, registry, ring_push_
from mcic.kernels.ring_push import rejected_labels

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason=f"no native code: {native.load()[1]}")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def empty_bank(classes=3, slots=4, channels=5, *, dtype=torch.float32, device=CPU):
    """bank, ids, counts, cursor; entries that were never written are NaN."""
    return (
        torch.full((classes, slots, channels), torch.nan, dtype=dtype, device=device),
        torch.full((classes, slots), -1, device=device),
        torch.zeros(classes, dtype=torch.int32, device=device),
        torch.zeros(classes, dtype=torch.int32, device=device),
    )


def rows_of(labels, channels=5, *, dtype=torch.float32, device=CPU):
    """contexts, labels, context_ids."""
    labels = torch.as_tensor(labels, dtype=torch.int32)
    contexts = torch.randn(len(labels), channels, dtype=torch.float64).to(dtype)
    return contexts.to(device), labels.to(device), torch.arange(len(labels), device=device)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=3000, deadline=None)
@given(slots=st.integers(1, 5), start=st.integers(0, 4), sequence=st.binary(min_size=1, max_size=40))
def test_every_class_is_a_deque(slots, start, sequence):
    """A byte of the sequence is a row: its label -2…2, and whether a push ends after it, an empty one at times."""
    labels = torch.tensor([byte % 5 - 2 for byte in sequence], dtype=torch.int32)
    ends = [i + 1 for i, byte in enumerate(sequence) for _ in range(max(byte // 5 % 8 - 5, 0))]
    bank, ids, counts, cursor = empty_bank(3, slots, 1, dtype=torch.float64)
    cursor += start % slots
    serials = torch.arange(len(sequence))
    for first, last in zip([0, *ends], [*ends, len(sequence)], strict=True):
        push = serials[first:last]
        ring_push_(bank, ids, counts, cursor, push[:, None].double(), labels[first:last], push, backend="native")
    queues = [deque(maxlen=slots) for _ in range(3)]
    for serial, label in enumerate(labels.tolist()):
        if label >= 0:
            queues[label].append(serial)
    assert counts.tolist() == [len(queue) for queue in queues]
    ids, values = ids.tolist(), bank[..., 0].nan_to_num(-1).tolist()
    for k, (queue, following) in enumerate(zip(queues, cursor.tolist(), strict=True)):
        expected = [-1] * slots
        for i, row in enumerate(reversed(queue)):
            expected[(following - 1 - i) % slots] = row
        assert ids[k] == expected
        assert values[k] == expected


LAYOUTS = {
    "contiguous": lambda rows: rows.clone(),
    "one row for all": lambda rows: rows[:1].expand_as(rows),
    "a column range": lambda rows: torch.cat([rows, rows, rows], 1)[:, 1 : 1 + rows.shape[1]],
    "every second column": lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
    "channels outermost": lambda rows: rows.T.contiguous().T,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 16, 40])
def test_bytes_of_every_layout(dtype, layout, channels):
    contexts, labels, ids = rows_of([0, 2, -1, 2, 2, 0, 2, 2, 1], channels, dtype=dtype)
    contexts = LAYOUTS[layout](contexts)
    labels, ids = labels.repeat_interleave(2)[::2], ids.repeat_interleave(3)[::3]
    banks = []
    for backend in ("native", "reference"):
        banks.append(empty_bank(3, 4, channels, dtype=dtype))
        for _ in range(3):
            ring_push_(*banks[-1], contexts, labels, ids, backend=backend)
    assert_same(*banks)


def test_strided_bank():
    def every_second(whole):
        return whole.transpose(0, 1)[::2]

    rows = rows_of([2, 2, 0, 1, 2, 2], 4)
    banks = []
    for backend in ("native", "reference"):
        bank = [torch.zeros(4, 6, 8)[..., ::2], torch.zeros(4, 6, dtype=torch.int64)]
        bank += [torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.int32)]
        views = [every_second(tensor) for tensor in bank]
        ring_push_(*views[:2], *(view[:, 0] for view in views[2:]), *rows, backend=backend)
        banks.append(bank)
    assert_same(*banks)
    assert banks[0][0].any()


def test_rows_take_the_type_of_the_bank():
    banks = []
    contexts, labels, ids = rows_of([0, 1, 1])
    for backend in ("native", "reference"):
        banks.append(empty_bank(dtype=torch.bfloat16))
        ring_push_(*banks[-1], contexts.requires_grad_(), labels, ids, backend=backend)
        assert not banks[-1][0].requires_grad
    assert_same(*banks)


@pytest.mark.parametrize("labels", [[], [-1, -5]])
def test_nothing_to_push(labels):
    bank = empty_bank()
    ring_push_(*bank, *rows_of(labels), backend="native")
    assert_same(bank, empty_bank())


def test_a_label_out_of_range_changes_nothing():
    bank = empty_bank()
    with pytest.raises(ValueError, match="labels must be below the 3 classes of the bank, got 3"):
        ring_push_(*bank, *rows_of([0, 1, 3]), backend="native")
    assert_same(bank, empty_bank())


def arguments(**changes):
    """Arguments of the operation itself, by name."""
    bank, ids, counts, cursor = empty_bank()
    contexts, labels, context_ids = rows_of([0, -1, 2])
    rejected = torch.zeros((), dtype=torch.int32)
    given = {"bank": bank, "ids": ids, "counts": counts, "cursor": cursor, "rejected": rejected}
    given |= {"contexts": contexts, "labels": labels, "context_ids": context_ids}
    return {name: changes.get(name, lambda t: t)(tensor) for name, tensor in given.items()}


def operation():
    from mcic.kernels.ring_push import native as push

    return push._push


@pytest.mark.parametrize("name", ["ids", "counts", "cursor", "rejected", "contexts", "labels", "context_ids"])
def test_the_operation_names_the_argument_that_does_not_fit(name):
    with pytest.raises(ValueError, match=f"ring_push_: {name} must be .* on the CPU, got"):
        operation()(**arguments(**{name: lambda tensor: tensor.short()}))
    with pytest.raises(ValueError, match=f"ring_push_: {name} must be"):
        operation()(**arguments(**{name: lambda tensor: tensor[None]}))


def test_the_operation_bumps_versions():
    given = arguments()
    operation()(*given.values())
    versions = {name: tensor._version for name, tensor in given.items()}
    assert all(versions[name] == 1 for name in ("ids", "counts", "cursor", "bank", "rejected"))
    assert not any(versions[name] for name in ("contexts", "labels", "context_ids"))


def opcheck(device):
    given = {name: tensor.to(device) for name, tensor in arguments().items()}
    given["bank"].zero_()  # opcheck compares with ==
    torch.library.opcheck(operation(), tuple(given.values()))


def test_opcheck():
    opcheck(CPU)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_push_compiles_without_a_break(backend):
    torch.compiler.reset()

    def step(bank, ids, counts, cursor, contexts, labels, context_ids):
        ring_push_(bank, ids, counts, cursor, contexts * 2, labels, context_ids, backend=backend)
        return bank.nan_to_num().sum() + counts.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    banks = [empty_bank(), empty_bank()]
    before = banks[0][0]._version
    for labels in ([0, 1, 1], [2, -1, 2], [1, 1, 1]):
        rows = rows_of(labels)
        torch.testing.assert_close(compiled(*banks[0], *rows), step(*banks[1], *rows))
    assert_same(*banks)
    assert banks[0][0]._version > before


def test_a_compiled_reference_counts_what_it_cannot_refuse():
    torch.compiler.reset()
    compiled = torch.compile(ring_push_, fullgraph=True, backend="aot_eager")
    bank, expected = empty_bank(), empty_bank()
    contexts, labels, ids = rows_of([0, 3, 1, 7])
    before = rejected_labels(CPU)
    compiled(*bank, contexts, labels, ids, backend="reference")
    ring_push_(*expected, contexts, labels.masked_fill(labels > 2, -1), ids)
    assert_same(bank, expected)
    assert rejected_labels(CPU) == before + 2


def test_native_is_what_auto_takes():
    assert registry.choose("ring_push_", "auto", CPU, torch.float32) == "native"


# ---- on a GPU


needs_cuda_part = pytest.mark.skipif(
    native.load()[0] is not None and native.load()[0].cuda is None, reason="the CUDA part is not built"
)


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@needs_cuda_part
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_fuzz(gpu, dtype):
    """Sizes around those of warps, blocks and vectors, many rows of few classes and the other way round."""
    draw = torch.Generator().manual_seed(1)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    for _ in range(100):
        classes, slots, channels = one_of(1, 3, 21, 81), one_of(1, 2, 64, 1500), one_of(1, 7, 32, 257, 512, 4104)
        if classes * slots * channels > 2**25:
            continue
        banks = [empty_bank(classes, slots, channels, dtype=dtype, device=gpu) for _ in range(2)]
        for _ in range(3):
            labels = torch.randint(-1, classes + one_of(0, 1), (one_of(0, 1, 31, 336, 1024, 3000),), generator=draw)
            contexts, labels, ids = rows_of(labels, channels, dtype=dtype, device=gpu)
            contexts = LAYOUTS[one_of(*LAYOUTS)](contexts)
            for bank, backend in zip(banks, ("native", "reference"), strict=True):
                ring_push_(*bank, contexts, labels, ids, backend=backend)
        assert_same(*banks)


@pytest.mark.gpu
@needs_cuda_part
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gpu_counts_labels_out_of_range_without_waiting(gpu, backend):
    bank, expected = empty_bank(device=gpu), empty_bank(device=gpu)
    contexts, labels, ids = rows_of([0, 3, 1, 7, -1], device=gpu)
    ring_push_(*expected, contexts, labels.masked_fill(labels > 2, -1), ids)
    before = rejected_labels(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ring_push_(*bank, contexts, labels, ids, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(bank, expected)
    assert rejected_labels(gpu) == before + 2


@pytest.mark.gpu
@needs_cuda_part
def test_gpu_graph_replays(gpu):
    bank, expected = empty_bank(device=gpu), empty_bank(device=gpu)
    contexts, labels, ids = rows_of([0, 1, 1, -1, 2, 1, 3], device=gpu)
    ring_push_(*bank, contexts, labels, ids, backend="native")
    before = rejected_labels(gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring_push_(*bank, contexts, labels, ids, backend="native")
    ring_push_(*expected, contexts, labels, ids, backend="reference")
    for i in range(5):
        contexts.normal_()
        labels.copy_(labels.roll(1))
        ids.fill_(i)
        graph.replay()
        ring_push_(*expected, contexts, labels, ids, backend="reference")
    assert_same(bank, expected)
    assert rejected_labels(gpu) == before + 11


@pytest.mark.gpu
@needs_cuda_part
def test_gpu_opcheck(gpu):
    opcheck(gpu)


@pytest.mark.gpu
@needs_cuda_part
def test_gpu_beyond_two_billion_elements(gpu):
    classes, slots, channels = 3, 1024, 2**20
    if torch.cuda.mem_get_info(gpu)[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    bank, ids, counts, cursor = empty_bank(classes, slots, channels, dtype=torch.float16, device=gpu)
    cursor += slots - 1
    contexts, labels, row_ids = rows_of([2, 2, 0], channels, dtype=torch.float16, device=gpu)
    ring_push_(bank, ids, counts, cursor, contexts, labels, row_ids, backend="native")
    assert torch.equal(bank[2, -1], contexts[0])
    assert torch.equal(bank[2, 0], contexts[1])
    assert torch.equal(bank[0, -1], contexts[2])
    assert bank[..., 0].isnan().sum() == classes * slots - 3
    assert cursor.tolist() == [0, slots - 1, 1]


@pytest.mark.gpu
@needs_cuda_part
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one():
    other = torch.device("cuda", 1)
    banks = []
    rows = rows_of([0, 1, 2, 2], device=other)
    with torch.cuda.device(0):
        for backend in ("native", "reference"):
            banks.append(empty_bank(device=other))
            ring_push_(*banks[-1], *rows, backend=backend)
        assert torch.cuda.current_device() == 0
    assert_same(*banks)
