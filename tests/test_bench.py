"""The benches measure what they say: counts by hand, honest baselines, files that are well formed, no result on red."""

import csv
import json
import subprocess
import sys
import tarfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from mcic.kernels import class_pool, segmentation_losses
from mcic.kernels.registry import OPERATIONS

from bench import __main__ as bench_main
from bench import attention, counts, documents, engine, gpu, hotpath, ops, published, results, sanitized, step, targets
from bench.__main__ import chosen
from bench.cases import CONTEXTS, DEFAULT, ContextCase
from bench.engine import CaptureError, Settings, Task, Variant, launches_and_syncs, run
from bench.results import Row, is_ours
from bench.timing import Samples, measure, ratio
from mcic.build import build_model
from mcic.model.memory import MemoryBank
from mcic.model.propagation import Propagation
from mcic.objective import Objective

ROOT = Path(__file__).parent.parent
CPU, F64 = torch.device("cpu"), torch.float64
CASE = ContextCase(batch=3, side=9, channels=12, classes=6, slots=5, objects=2)


def test_attention_counts_by_hand():
    query, keys, values = torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)
    stored = torch.tensor([2, 1, 0], dtype=torch.int32)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    size = counts.AttentionSize.of(query.bfloat16(), keys, values, stored, mask)
    assert (size.rows, size.readable) == (3, 2 + 3)
    # 6 pixels and 3 rows of 4 + 5 numbers, 3 biases, 2 bytes each; 6 entropies of 4 bytes
    assert counts.attention_forward(size) == counts.Cost(2 * (6 * 9 + 3 * 9 + 3) + 4 * 6, 2 * 3 * 5 * 9)
    backward = counts.attention_backward(size, query_gradient=False)
    assert backward == counts.Cost(192 + 2 * (6 * 9 + 6), 2 * 3 * 5 * (5 + 5 + 4))
    with_query = counts.attention_backward(size, query_gradient=True)
    assert with_query == counts.Cost(backward.bytes + 2 * 6 * 4, backward.operations + 2 * 3 * 5 * 4)
    assert counts.projections_forward(size) == counts.Cost(4 * 3 * 4 + 2 * 4 * (16 + 4), 4 * 2 * 3 * 16)
    assert counts.projections_backward(size) == counts.Cost(4 * 3 * 4 + 2 * 2 * 4 * (16 + 4), 6 * 2 * 3 * 16)


def test_counts_of_c1():
    """DESIGN's case: 26,896 pixels, 192 readable entries each, D = E = 1024, bf16."""
    size = counts.AttentionSize(
        pixels=26896, per_image=1681, channels=1024, out=1024, bank_rows=1344, rows=1344, readable=16 * 192, element=2
    )
    cost = counts.attention_forward(size)
    assert cost.operations == 21_151_875_072
    assert cost.bytes == 2 * (26896 * 2048 + 1344 * 2049) + 4 * 26896
    assert cost.seconds(bandwidth=4e12, rate=1e15) == cost.bytes / 4e12
    assert cost.seconds(bandwidth=4e12, rate=1e14) == cost.operations / 1e14


def test_other_counts_by_hand():
    features, mask = torch.zeros(2, 4, 3, 5, dtype=torch.bfloat16), torch.tensor([[True, False, True]] * 2)
    pool = counts.class_pool(features, torch.zeros(2, 3, 3, 5), mask)
    assert pool == counts.Cost(2 * 2 * 4 * 15 + 4 * 4 * 15 + 6 + 6 * (4 * 4 + 4 + 1), 2 * 4 * 15 * 4)
    bank, labels = torch.zeros(3, 2, 4), torch.tensor([0, -1, 0, 0, 2], dtype=torch.int32)
    push = counts.ring_push(bank, torch.zeros(5, 4), labels)  # two rows of class 0 stay, one of class 2
    assert push == counts.Cost(3 * (4 * 8 + 16) + 4 * 5 + 8 * (3 + 2), 0)
    logits, masks = torch.zeros(2, 3, 2, 2), torch.zeros(3, 2, 2, 2, dtype=torch.uint8)
    forward = counts.segmentation_losses_forward(logits, masks)
    assert forward == counts.Cost(2 * 24 * 4 + 24 + 24, 2 * 48)
    assert counts.segmentation_losses_backward(logits, masks).bytes == forward.bytes + 2 * 24 * 4
    tags = torch.tensor([[True, False], [True, True]])
    made = counts.pseudo_masks(logits[:, 1:], logits, tags, saliency=True)
    assert made.bytes == 4 * (4 * 3 + 4 * 6 + 2 * (4 + 1 + 3))


def test_published_step_is_ours():
    """Values and the gradients of all parameters, over pushes that overwrite the oldest entries."""
    torch.manual_seed(1)
    steps = hotpath.variants(CASE.inputs(CPU, F64), dropout=0.0)
    assert steps["published"].inputs.class_mask.sum(1).tolist() == [3, 3, 3]
    for _ in range(4):
        results = {name: made.step() for name, made in steps.items()}
        theirs = steps["published"].layer
        for name, made in steps.items():
            for actual, expected in zip(results[name], results["published"], strict=True):
                torch.testing.assert_close(actual, expected)
            for key, parameter in made.layer.named_parameters():
                torch.testing.assert_close(parameter.grad, theirs.get_parameter(key).grad, msg=f"{name}: {key}")
    assert not torch.equal(steps["ours"].bank.entries, steps["ours"].inputs.entries)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("once", [False, True])
def test_published_layer_is_ours(threshold, once):
    inputs = CASE.inputs(CPU, F64)
    ours = Propagation(CASE.channels, dropout=0.0, threshold=threshold).double()
    theirs = published.PublishedPropagation(CASE.channels, dropout=0.0, threshold=threshold, project_once=once).double()
    theirs.load_state_dict(ours.state_dict())
    present = inputs.class_mask.any(0)
    memory = inputs.entries[present].flatten(0, 1)
    labels = present.nonzero().flatten().repeat_interleave(CASE.slots)
    augmented, entropy = theirs(inputs.features, memory, labels, inputs.class_mask)
    counts_ = torch.full((CASE.classes,), CASE.slots, dtype=torch.int32)
    reading = ours(inputs.features, inputs.entries, counts_, inputs.class_mask)
    torch.testing.assert_close(augmented, inputs.features + reading.update)
    torch.testing.assert_close(entropy, reading.entropy)


@pytest.mark.parametrize("rule", ["paper", "authors"])
def test_published_pool_is_ours(rule):
    inputs = CASE.inputs(CPU, F64)
    confidence = inputs.confidence if rule == "paper" else inputs.confidence.log() + 8
    rows, labels = published.pool(inputs.features, confidence, inputs.class_mask, threshold=0.5, rule=rule)
    contexts, _, valid = class_pool(inputs.features, confidence, inputs.class_mask, threshold=0.5, rule=rule)
    assert relative_error(rows, contexts[valid]) <= 1e-4  # the published divisor is clamped, not increased, by 1e-5
    assert labels.tolist() == valid.nonzero()[:, 1].tolist()
    assert valid.any()


def test_published_bank_is_ours():
    theirs = published.PublishedBank(3, 4, 2, device=CPU, dtype=torch.float32)
    ours = MemoryBank(3, 4, 2)
    for rows in (2, 1, 7, 3, 12):
        contexts, labels = torch.randn(rows, 2), torch.randint(0, 2, (rows,))
        theirs.push(contexts, labels)
        ours.push(contexts, labels.int(), torch.zeros(rows, dtype=torch.int64))
        for k in range(3):
            length, cursor = int(ours.counts[k]), int(ours.cursor[k])
            assert theirs.lengths[k] == length
            oldest_first = [(cursor - length + i) % 4 for i in range(length)]
            assert torch.equal(theirs.queues[k][:length], ours.entries[k, oldest_first])
    memory, labels = theirs.pull(torch.tensor([True, True, True]))
    assert torch.bincount(labels, minlength=3).tolist() == ours.counts.tolist()
    assert memory.shape == (int(ours.counts.sum()), 2)


def test_published_losses_are_ours():
    logits, context = torch.randn(2, 2, 4, 3, 3, dtype=F64)
    masks = torch.randint(0, 4, (3, 2, 3, 3), dtype=torch.uint8)
    masks[:, 0, 0] = 255
    expected = segmentation_losses(logits, context, masks)
    torch.testing.assert_close(published.losses(logits, context, masks), expected.float())


def test_published_training_step_has_our_loss():
    config = step.configuration("voc12-vgg16", CPU)
    config = replace(config, method=replace(config.method, dropout=0.0))
    torch.manual_seed(0)
    model = build_model(config.model, config.method, num_classes=step.CLASSES, backend="reference").train()
    model.memory.entries.normal_()
    model.memory.counts.fill_(config.method.slots)
    batch, ramp = step.random_batch(config, CPU), torch.tensor(0.7)
    theirs = step.PublishedStep(model, config, torch.float32).loss(batch, ramp)
    ours = Objective(config.method)(model, batch, ramp).total
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_steps_run_and_say_that_they_are_not_comparable():
    rows = list(step.run("voc12-vgg16", CPU, rounds=1, warmup=0))
    by_name = {row.variant: row for row in rows}
    assert set(by_name) == set(step.VARIANTS)
    for name in ("published", "reference", "network alone"):
        assert by_name[name].p50_ms > 0
        assert "not comparable" in by_name[name].note
    assert by_name["fused"].p50_ms is None
    assert "no faster backend" in by_name["fused"].note
    assert "need a GPU" in by_name["fused, graph"].note


def test_ratio_is_of_medians_with_the_spread_of_the_rounds():
    slow, fast = Samples((2.0, 4.0, 9.0)), Samples((1.0, 2.0, 3.0))
    made = ratio(slow, fast)
    assert made.of_medians == 2
    assert (made.low, made.high) == pytest.approx((2.0, 2.6))
    assert Samples((1.0, 2.0)).quantile(0.5) == 1.5


ONCE = Settings(CPU, rounds=1, warmup=1)


def task_of(variants, expected=None):
    """A task of these functions; `expected` is what they should compute."""
    made = {name: Variant(lambda compute=compute: compute, graph=True) for name, compute in variants.items()}
    return Task(name="task", case="case", scope="op", work="forward", dtype=torch.float32, cost=None, variants=made,
                expected=expected, baseline="slow")  # fmt: skip


def test_a_variant_that_fails_while_timed_leaves_the_others():
    calls = []

    def greedy():
        calls.append(1)
        if len(calls) == 2:  # the first finds out what it computes
            raise torch.OutOfMemoryError("no room")
        return {}

    slow, broken = run(task_of({"slow": dict, "greedy": greedy}), ONCE)
    assert slow.p50_ms is not None
    assert (broken.p50_ms, broken.note) == (None, "OutOfMemoryError: no room")
    calls[:] = [1]
    with pytest.raises(torch.OutOfMemoryError):
        measure({"greedy": greedy}, CPU, rounds=1, warmup=0)


def test_a_nan_is_no_result():
    def half_nan():
        return {"right": torch.ones(2), "wrong": torch.tensor([1.0, float("nan")])}

    (row,) = run(task_of({"slow": half_nan}, lambda: dict.fromkeys(("right", "wrong"), torch.ones(2))), ONCE)
    assert row.p50_ms is None
    assert "computes something else" in row.note


def as_if_on_a_gpu(monkeypatch, captured):
    """Settings of a GPU that the host stands in for; `captured` in the place of recording."""
    monkeypatch.setattr(engine, "measure", lambda runs, _, **kwargs: measure(runs, CPU, **kwargs | {"flush": None}))
    monkeypatch.setattr(engine, "flush_buffer", lambda _: None)
    monkeypatch.setattr(engine, "release", lambda _: None)
    monkeypatch.setattr(engine, "_look_inside", lambda *_, **__: None)
    monkeypatch.setattr(engine, "_captured", captured)
    return replace(ONCE, device=torch.device("cuda"))


def test_a_graph_is_compared_with_a_graph(monkeypatch):
    settings = as_if_on_a_gpu(monkeypatch, lambda name, build: build())
    both = {row.variant: row for row in run(task_of({"slow": dict, "fast": dict}), settings)}
    assert list(both) == ["slow", "slow, graph", "fast", "fast, graph"]
    assert both["slow, graph"].speedup == both["slow"].speedup == 1
    assert not both["fast, graph"].note
    settings = replace(settings, no_graph=("slow",))
    one = {row.variant: row for row in run(task_of({"slow": dict, "fast": dict}), settings)}
    assert list(one) == ["slow", "fast", "fast, graph"]
    assert one["fast, graph"].note == "compared with slow without a graph"


def test_a_recording_that_fails_is_no_note(monkeypatch):
    """The process is spent: its allocator and generator go on as if the recording did."""

    def captured(name, build):
        raise CaptureError(name, "a host read")

    settings = as_if_on_a_gpu(monkeypatch, captured)
    with pytest.raises(CaptureError, match="fast: could not be recorded as a CUDA graph: a host read") as caught:
        run(task_of({"fast": dict}), settings)
    assert caught.value.variant == "fast"


def test_losses_of_each_variant_have_leaves_of_their_own(monkeypatch):
    """A leaf's gradient is accumulated on the stream where it was first used, which cannot be that of a recording."""
    leaves = []
    original = ops.published.losses
    monkeypatch.setattr(ops.published, "losses", lambda *maps: leaves.append(maps[0]) or original(*maps))
    for task in ops.loss_tasks("tiny", CPU, torch.float32):
        for _ in range(2):
            task.variants["six cross-entropies"].build()()
    assert len({id(leaf) for leaf in leaves}) == 4
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)


def test_only_what_reads_no_value_on_the_host_is_recorded():
    by_work = {}
    for thunk in ops.tasks(("tiny",), CPU, torch.float32):
        for task in thunk():
            graphs = {name for name, variant in task.variants.items() if variant.graph}
            by_work.setdefault((task.name, task.work), set()).update(graphs)
    forward = by_work["sparse_attention", "forward"]
    assert forward == {"fused", "reference", "SDPA, masked union", "SDPA, gathered", "FlexAttention"}
    assert by_work["sparse_attention", "backward"] == forward | {"published", "published, compiled"}
    assert by_work["propagation layer", "forward"] == {"fused", "reference"}
    assert "published, compiled" not in by_work["propagation layer", "backward"], "its parameters are shared"
    assert by_work["segmentation_losses", "backward"] >= {"fused", "six cross-entropies"}


def test_dense_forms_of_large_banks_are_left_out(monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_DENSE", 100)
    for thunk in attention.tasks("tiny", CPU, torch.float32):
        for task in thunk():
            rows = {row.variant: row for row in run(task, ONCE)}
            for name in {"published", "reference", "SDPA, masked union"} & set(rows):
                assert "left out" in rows[name].note
            if "SDPA, gathered" in rows:
                assert rows["SDPA, gathered"].p50_ms is not None, "it makes no such matrix"


def test_what_the_targets_need_is_measured_before_the_banks_of_pixels(monkeypatch):
    made = []
    for module, names in ((attention, ("operation_tasks", "layer_tasks", "skipping_task")),
                          (ops, ("push_task", "pool_tasks", "mask_task", "loss_tasks"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, lambda *a, n=name: made.append((n, a[0])) or ())
    for thunk in ops.tasks(DEFAULT["cuda"], CPU, torch.float32):
        thunk()
    last = max(place for place, (_, case) in enumerate(made) if not str(case).startswith("pixels"))
    assert {case for _, case in made[last + 1 :]} == {"pixels-4096", "pixels-512", "pixels-16384"}
    assert {name for name, _ in made[:8]} == {name for name, _ in made}, "all of the first case comes first"


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments, "--device", "cpu", "--threads", "1", "--rounds", "2"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_leaves_csv_json_and_a_plot(tmp_path):
    green = tmp_path / "test_green.py"
    green.write_text("def test_green():\n    pass\n")
    out = tmp_path / "out"
    done = run_bench("all", "--case", "tiny", "--tests", str(green), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        f"{group}-cpu.{kind}" for group in ("ops", "hot-path") for kind in ("csv", "json", "png")
    }
    for group in ("ops", "hot-path"):
        (run,) = json.loads((out / f"{group}-cpu.json").read_text())
        about, rows = run["facts"], run["rows"]
        assert about["complete"]
        assert about["device"] == "cpu"
        assert "1 passed" in about["verified"]
        assert {"date", "command", "commit", "torch", "cpu", "threads"} <= set(about)
        with (out / f"{group}-cpu.csv").open() as file:
            assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in rows]
        for row in rows:
            if row["p50_ms"] is None:
                assert row["note"], row
            else:
                assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
                assert row["share_of_limit"] is None  # ratios only on a CPU
    steps = {row["variant"]: row for row in rows if row["work"] == "step"}
    assert steps["published"]["speedup"] == 1
    assert {row["work"] for row in rows} == {"step", "pool", "push", "read", "attention", "backward"}
    page = documents.measured([run])
    assert "### hot-path, CPU" in page
    assert "1.00×" in page
    assert "ms p50" not in page
    assert page.count("context branch tiny") == 1  # its parts have times, and no ratio
    assert page.count("waiting for a GPU") == 2 + len(targets.GPU)


def about_run(date, commit, **facts):
    known = {"device": "NVIDIA X", "driver": "1", "cuda": "13", "torch": "2", "verified": "v", "ceilings": {}}
    return known | {"date": date, "commit": commit, "command": "python -m bench ops"} | facts


def op_row(name, variant="fused", milliseconds=1.0, **columns):
    known = {"group": "ops", "case": "c1 (…)", "scope": "op", "work": "forward", "dtype": "bfloat16"}
    times = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds}
    return Row(**known | {"name": name, "variant": variant} | times | columns)


def test_a_run_replaces_what_it_measured_and_nothing_else(tmp_path):
    first, second = about_run("2026-01-01", "a" * 40), about_run("2026-01-02", "b" * 40)
    results.save("ops", [op_row("pool"), op_row("push"), op_row("push", "slow")], first, tmp_path, complete=True)
    results.save("ops", [op_row("push")], second, tmp_path, complete=False)
    newer = [op_row("push", milliseconds=2.0), op_row("push", dtype="float16")]
    results.save("ops", newer, second, tmp_path, complete=True)
    runs = results.load(tmp_path)
    kept = [(run["facts"]["commit"][0], row["name"], row["variant"], row["dtype"], row["p50_ms"])
            for run in runs for row in run["rows"]]  # fmt: skip
    assert kept == [
        ("a", "pool", "fused", "bfloat16", 1.0), ("a", "push", "slow", "bfloat16", 1.0),
        ("b", "push", "fused", "bfloat16", 2.0), ("b", "push", "fused", "float16", 1.0),
    ]  # fmt: skip
    with (tmp_path / "ops-nvidia-x.csv").open() as file:
        assert [(row["name"], row["commit"][0]) for row in csv.DictReader(file)] == [(n, c) for c, n, *_ in kept]
    page = documents.measured(runs)
    assert page.count("### ops, NVIDIA X") == 1
    assert "commit aaaaaaaaaa" in page
    assert "commit bbbbbbbbbb" in page
    assert [row["variant"] for row in results.rows_of_commit("ops", first, tmp_path)] == ["fused", "slow"]


def test_a_result_that_was_cut_off_while_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = results.save("ops", [op_row("pool")], about_run("2026-01-01", "a"), tmp_path, complete=False)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.save("ops", [op_row("push")], about_run("2026-01-02", "a"), tmp_path, complete=False)
    assert path.read_text() == before


def test_after_a_failed_recording_another_process_goes_on(tmp_path, monkeypatch, capsys):
    def rows(group, options, device, ceilings, there):
        yield op_row("pool")
        raise CaptureError("fused", "a host read")

    became = []
    monkeypatch.setattr(bench_main, "_rows", rows)
    monkeypatch.setattr("os.closerange", lambda *_: None)
    monkeypatch.setattr("os.execv", lambda _, command: became.append(command) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["bench", "ops", "--device", "cpu"])
    options = bench_main.parser().parse_args(["ops", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_main.measure(options, "as told")
    (command,) = became
    again = bench_main.parser().parse_args(command[3:])
    assert (again.what, again.resume, again.no_graph, again.verified) == ("ops", True, ["fused"], "as told")
    assert [row["name"] for run in results.load(tmp_path) for row in run["rows"]] == ["pool"]
    assert "fused: could not be recorded as a CUDA graph: a host read" in capsys.readouterr().out


def test_resume_passes_over_what_is_there(tmp_path):
    green = tmp_path / "test_green.py"
    green.write_text("def test_green():\n    pass\n")
    common = ("ops", "--case", "tiny", "--tests", str(green), "--out", str(tmp_path / "out"))
    assert run_bench(*common).returncode == 0
    (run,) = results.load(tmp_path / "out")
    run["rows"] = [row for row in run["rows"] if row["name"] != "pseudo_masks"]
    (tmp_path / "out" / "ops-cpu.json").write_text(json.dumps([run]))
    assert run_bench(*common, "--resume").returncode == 0
    there, new = results.load(tmp_path / "out")
    assert there["rows"] == run["rows"]
    assert {row["name"] for row in new["rows"]} == {"pseudo_masks"}


def test_nothing_is_measured_on_red(tmp_path):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    done = run_bench("hot-path", "--case", "tiny", "--tests", str(red), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Nothing is measured" in done.stdout
    assert not (tmp_path / "out").exists()


def test_cases_are_chosen_by_name():
    known = ("vgg", "resnet")
    assert chosen(Namespace(what="hot-path", case=None), known, ("vgg",)) == ("vgg",)
    assert chosen(Namespace(what="all", case=["c1", "resnet"]), known, ()) == ("resnet",)
    with pytest.raises(SystemExit, match="unknown case c1: hot-path has vgg, resnet"):
        chosen(Namespace(what="hot-path", case=["c1", "vgg"]), known, ())


def test_the_measured_part_replaces_itself_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nby hand\n")
    documents.insert(page, "first\n", title="unused")
    page.write_text(page.read_text() + "\nby hand too\n")
    documents.insert(page, "second\n", title="unused")
    text = page.read_text()
    assert text.startswith("# Title\n\nby hand\n")
    assert text.endswith("\nby hand too\n")
    assert "second" in text
    assert "first" not in text


def test_a_gpu_run_no_longer_waits():
    row = Row(group="ops", name="a", case="b", scope="op", work="forward", variant="fused", dtype="bfloat16",
              p20_ms=0.9, p50_ms=1.0, p80_ms=1.1, share_of_limit=0.5)  # fmt: skip
    about = {"device": "NVIDIA X", "driver": "1", "cuda": "13", "command": "c", "date": "2026-01-01", "torch": "2",
             "commit": "0123456789abcdef-dirty", "verified": "v", "complete": False,
             "ceilings": {"bytes_per_s": 4e12, "bfloat16": 8e14}}  # fmt: skip
    page = documents.measured([{"facts": about, "rows": [vars(row)]}])
    assert "### ops, NVIDIA X" in page
    assert "50 %" in page
    assert "0123456789-dirty" in page
    assert "copy 4.00 TB/s, bfloat16 product 800 TFLOP/s" in page
    assert "Cut off" in page
    assert page.count("waiting for a GPU") == 1


def test_targets_are_met_missed_or_not_measured():
    def row(work, variant, milliseconds, name="sparse_attention", case="c1 (…, θ 0)", dtype="bfloat16"):
        times = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds, "share_of_limit": 0.5}
        return vars(
            Row(group="ops", name=name, case=case, scope="op", work=work, variant=variant, dtype=dtype, **times)
        )

    layer = {"name": "propagation layer"}
    rows = [
        row("forward", "fused, graph", 9.0, dtype="float16"),
        row("forward", "fused", 0.060), row("forward", "fused, graph", 0.040), row("backward", "fused", 0.080),
        row("forward", "fused", 9.0, case="c1 (…, θ 1)"), row("forward", "SDPA, masked union", 0.05),
        row("forward", "published", 6.0, **layer), row("backward", "published", 6.0, **layer),
        row("forward", "fused", 0.4, **layer), row("backward", "fused", 0.6, **layer),
    ]  # fmt: skip
    table = targets.table([{"facts": {"device": "GPU X"}, "rows": rows}]).split("\n")
    cells = dict(line.strip("| ").rsplit(" | ", 1) for line in table if line)
    assert cells["attention forward, C1: ≤ 45 µs"] == "40 µs"
    assert cells["attention backward, C1: ≤ 75 µs"] == "80 µs, **missed**"
    assert cells["layer, forward + backward, C1: ≥ 10× published, eager"] == "12×"
    sdpa = "attention forward, C1: ≥ 1.5× SDPA without threshold"
    assert cells[sdpa] == "0.833×, **missed**", "without a graph, as SDPA has none here"
    assert cells["step: no host wait"] == cells["step, VGG16: ≥ 3× the published images/s"] == "not measured"
    steps = [row("training step", way, 1.0, name="voc12-vgg16") | {"group": "step", "images_per_s": speed}
             for way, speed in (("published", 100.0), ("fused", 250.0), ("fused, graph", 350.0))]  # fmt: skip
    rows += [row("forward", "SDPA, masked union, graph", 0.08), *steps]
    more = targets.table([{"facts": {"device": "GPU X"}, "rows": rows}])
    assert f"| {sdpa} | 2× |" in more
    assert "| step, VGG16: ≥ 3× the published images/s | 3.5× |" in more, "the compiled one is not there"


def test_gpu_stages_are_limited_and_independent(tmp_path):
    python = sys.executable
    slow = gpu.Stage("slow", (python, "-c", "import time; print('on', flush=True); time.sleep(60)"), 0.05)
    ended = gpu.run(slow, tmp_path, 3.0, verified="")
    assert (ended.name, ended.state, ended.last) == ("slow", "timed out", "on")
    assert ended.seconds < 20
    code = "import os, sys; print(os.environ['KIND']); sys.exit(3)"
    failing = gpu.Stage("tests", (python, "-c", code), 0.5, {"KIND": "2 failed"})
    ended = gpu.run(failing, tmp_path, 60.0, verified="")
    assert (ended.state, ended.last) == ("failed 3", "2 failed")
    assert gpu.run(gpu.Stage("tool", ("no-such-tool",), 0.5), tmp_path, 60.0, verified="").state == "missing"
    assert gpu.run(failing, tmp_path, 0.5, verified="").state == "no time"
    told = gpu.Stage("ops", (python, "-c", "import sys; print(sys.argv[1:])"), 0.5)
    verified = gpu._verified([ended])
    last = gpu.run(told, tmp_path, 60.0, verified=verified).last
    assert last == "['--verified', 'pytest -m gpu: failed 3, 2 failed']"


def test_the_build_names_what_later_stages_lack(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LATER", ("bench.gpu",))
    gpu.check()
    assert "torch" in capsys.readouterr().out.lower()
    monkeypatch.setattr(gpu, "NEEDED", (*gpu.NEEDED, "no_such", "nor_this"))
    with pytest.raises(SystemExit, match="missing packages: no_such, nor_this"):
        gpu.check()


def test_all_of_a_call_comes_back_in_one_file_even_if_cut_off(tmp_path, monkeypatch):
    """The archive is there after the first stage, and flags reach the last."""
    results_, out = tmp_path / "bench" / "results", tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    for name, value in (("ROOT", tmp_path), ("RESULTS", results_)):
        monkeypatch.setattr(gpu, name, value)
    code = f"import sys, pathlib; print(pathlib.Path({str(out)!r}, 'results.tar.gz').exists(), sys.argv[1:])"
    stages = tuple(gpu.Stage(name, (sys.executable, "-c", code), 0.5) for name in ("build", "tune"))
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.main(["--only", "build,tune", "--minutes", "1", "--", "--kernel", "a"]) == 0
    assert [path.name for path in out.iterdir()] == ["results.tar.gz"]
    with tarfile.open(out / "results.tar.gz") as archive:
        said = {name: archive.extractfile(name).read().decode().strip() for name in archive.getnames()}
    logs = "bench/results/logs"
    assert said == {f"{logs}/build.log": "False []", f"{logs}/tune.log": "True ['--kernel', 'a']"}
    with pytest.raises(SystemExit):
        gpu.main(["--only", "build", "--", "--kernel", "a"])


def test_the_sanitizer_watches_every_operation(monkeypatch):
    called = set()
    for name in OPERATIONS:
        operation = getattr(sanitized, name)
        monkeypatch.setattr(sanitized, name, lambda *a, o=operation, n=name, **k: called.add(n) or o(*a, **k))
    sanitized.exercise(CPU, (torch.float32,))
    assert called == set(OPERATIONS)


def test_nothing_is_launched_on_a_cpu():
    assert launches_and_syncs(lambda: torch.ones(3).sum()) == (0, 0)


@pytest.mark.gpu
def test_launches_and_waits_are_counted():
    ones = torch.ones(10, device="cuda")
    assert launches_and_syncs(lambda: ones + 1) == (1, 0)
    launches, waits = launches_and_syncs(lambda: (ones + 1).max().item())
    assert launches == 3  # sum, maximum and the copy to the host
    assert waits == 1


@pytest.mark.gpu
def test_operations_are_measured_on_a_gpu():
    """Every form of ours gets a number, replayed as a graph too, and agrees with the reference."""
    device = torch.device("cuda")
    settings = Settings(device, rounds=2, warmup=1, ceilings={"bytes_per_s": 1e12, "bfloat16": 1e14})
    for thunk in ops.tasks(("tiny",), device, torch.bfloat16):
        for task in thunk():
            for row in run(task, settings):
                if is_ours(row.variant) or row.variant in ("published", "eager", "reference"):
                    assert row.p50_ms is not None, row
                if row.variant == "fused":
                    assert row.error is not None
                    assert row.launches >= 1
                    assert row.syncs == 0


def test_cases_have_the_classes_they_say():
    for case in CONTEXTS.values():
        mask = case.class_mask()
        assert mask[:, 0].all()
        assert (mask.sum(1) == case.objects + 1).all()
