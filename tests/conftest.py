"""What every test shares."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, and deterministic mode asks for it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread costs more than it brings

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mcic-tests-")  # instead of the user's
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))

import numpy as np
import pytest
import torch

import mcic

GOLDEN = Path(__file__).parent / "golden"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on CPU tensors

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""largest `relative_error` of a fused kernel's values against the fp64 reference; gradients may have three times it"""


@pytest.fixture(autouse=True)
def _seeded():
    """Every test begins with the same numbers and threads: sums are rounded by how many threads make them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_unconfigure():
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Where a Triton kernel is tested: on CPU tensors in Triton's interpreter, or compiled on a GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off where there is a GPU")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def golden():
    """Golden numbers by name: a dict of tensors (scalars as Python numbers)."""

    def load(name: str) -> dict:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in arrays.items()}

    return load


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of an exported network with random weights."""
    from networks import save_random_network

    path = tmp_path_factory.mktemp("model")
    save_random_network(path)
    return path


@pytest.fixture(scope="session")
def predictor(model):
    return mcic.load(model, device="cpu")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest expected magnitude."""
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()
