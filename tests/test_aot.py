"""Every Triton kernel compiles for the shipped architectures, and the check of that can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mcic.kernels import configs

ROOT = Path(__file__).parents[1]

# Appended to bench.aot's cases: what it must refuse, one reason each.
BROKEN = """
import sys
import torch, triton
import triton.language as tl
from bench import aot
from bench.kernel_cases import CASES, Case

@triton.jit
def spilling_kernel(x, y):
    o = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    b = tl.load(x + o).to(tl.float32)
    tl.store(y + o, b - tl.sum(b))  # 512 values a thread wait for the sum

@triton.jit
def product_kernel(x, y, z, K):
    o_m, o_k = tl.arange(0, 64), tl.arange(0, 64)
    b = tl.zeros([64, 64], tl.float32)
    for k in range(0, K, 64):
        b_x = tl.load(x + o_m[:, None] * K + k + o_k[None, :])
        b_y = tl.load(y + (k + o_k)[:, None] * 64 + o_m[None, :])
        b = tl.dot(b_x, b_y, b)
    tl.store(z + o_m[:, None] * 64 + o_m[None, :], b)

def spilling(dtype, device):
    spilling_kernel[1,](torch.empty(128, 128, dtype=dtype), torch.empty(128, 128, dtype=dtype), num_warps=1)

def product(stages):
    def run(dtype, device):
        blocks = [torch.empty(64, 64, dtype=torch.bfloat16) for _ in range(3)]
        product_kernel[1,](*blocks, 4096, num_warps=4, num_stages=stages)
    return run

def crashing(dtype, device):
    raise RuntimeError("no such kernel")

CASES += [Case("broken spilling", spilling, True), Case("broken oversized", product(20), True),
          Case("broken crashing", crashing, True), Case("unlucky", product(2), True), Case("good", product(2), True)]
if sys.argv[1] == "unlucky":
    aot.tensor_core_instructions = lambda cubin: {}
sys.exit(aot.main(["--only", sys.argv[1], "--jobs", "1"]))
"""

# bench.tune's choice among invented times.
CHOICE = """
from pathlib import Path
import tempfile
from bench import tune
from mcic.kernels import configs

folder = tempfile.TemporaryDirectory()
configs.TABLES = Path(folder.name)
kernel, old = "class_pool_fwd_winners_kernel", {"BLOCK_N": 128, "num_warps": 4}
configs.store("sm_90", kernel, "16", old)
for best, dry_run in ((0.98, False), (0.5, True), (0.5, False)):
    times = {64: float("inf"), 128: 1.0, 256: 0.99, 512: best}
    tune.measure = lambda architecture, kernel, bits, point: times[point["BLOCK_N"]] if point["num_warps"] == 4 else 3.0
    tune.tune("sm_90", kernel, "16", dry_run=dry_run)
    print("now", configs.table("sm_90")[kernel]["16"]["BLOCK_N"])
"""


def python(*arguments, interpret=None):
    """Run Python in the repository's root, with or without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def compile_broken(tmp_path):
    """Run bench.aot over some of the BROKEN cases; Triton wants kernels in a file."""
    script = tmp_path / "broken.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{BROKEN}")
    return lambda cases: python(str(script), cases)


@pytest.mark.slow
def test_shipped_configurations_compile(tmp_path):
    report = tmp_path / "aot.json"
    result = python("-m", "bench.aot", "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {(row["architecture"], row["precision"]) for row in rows} == {
        (architecture, precision) for architecture in ("sm_80", "sm_90") for precision in ("bf16", "fp32")
    }
    for architecture in ("sm_80", "sm_90"):
        compiled = {row["kernel"] for row in rows if row["architecture"] == architecture}
        assert compiled == {entry.partition(".")[0] for entry in configs.table(architecture)}
    products = [row for row in rows if row["kernel"] == "class_pool_fwd_kernel" and row["precision"] == "bf16"]
    assert all(row["tensor_cores"] for row in products)
    assert "sm_80" in result.stdout


@pytest.mark.parametrize(
    ("cases", "reasons"),
    [
        (
            "broken",
            [
                "FAIL spilling_kernel, sm_80, fp32: spills",
                "FAIL product_kernel, sm_90, bf16: needs 327680 bytes of shared memory, sm_90 has 232448",
                "FAIL broken crashing, sm_90, bf16: RuntimeError: no such kernel",
            ],
        ),
        ("unlucky", ["FAIL product_kernel, sm_80, bf16: multiplies without tensor cores"]),
    ],
)
def test_what_is_refused(compile_broken, cases, reasons):
    result = compile_broken(cases)
    assert result.returncode == 1, result.stderr
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    for reason in reasons:
        assert any(line.startswith(reason) for line in failures), failures


def test_a_good_kernel_is_not_refused(compile_broken):
    result = compile_broken("good")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HGMMA" in result.stdout
    assert "FAIL" not in result.stdout


def test_the_interpreter_is_refused():
    result = python("-m", "bench.aot", interpret="1")
    assert result.returncode == 2
    assert "without TRITON_INTERPRET" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so():
    result = python("-m", "bench.tune")
    assert result.returncode == 2
    assert "CUDA GPU" in result.stderr


def test_tuning_stores_what_is_clearly_faster():
    result = python("-c", CHOICE)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("now")] == ["now 128", "now 128", "now 512"]


def test_every_tuned_parameter_is_in_the_tables():
    names = (
        "import json; from bench.tune import SEARCHES as s; print(json.dumps({k: list(v.grid) for k, v in s.items()}))"
    )
    result = python("-c", names)
    assert result.returncode == 0, result.stderr
    for kernel, parameters in json.loads(result.stdout).items():
        for entry in configs.table("sm_90")[kernel].values():
            assert set(parameters) <= set(entry), kernel
