"""The optional build: what there is, what is missing and why, and the CUDA source without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "mcic")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, never built."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "mcic" / "kernels").symlink_to("../kernels")  # so that PYTHONPATH suffices to use the copy
    return tmp_path


def build(checkout, **variables):
    """Run the build in the copy; stdout and stderr together."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=os.environ | {"MCIC_BUILD_CUDA": "auto"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_info(checkout):
    """What the copy prints; an editable installation would lend it the extension that it lacks."""
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')]"
    return subprocess.run(
        [sys.executable, "-c", f"{alone}; import mcic; print(mcic.__file__); print(mcic.build_info())"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.removeprefix(f"{checkout}/mcic/__init__.py\n")


def test_without_a_compiler_the_package_says_what_it_lacks(checkout):
    (checkout / "bin").mkdir()
    done = build(checkout, PATH=str(checkout / "bin"), CXX="g++", MCIC_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert "without the native cpu part: no C++ compiler: 'g++' is not on PATH" in done.stdout
    assert not list(checkout.glob("kernels/*.so"))
    told = build_info(checkout)
    assert "C++ part: not there: no C++ compiler" in told
    assert "CUDA part: not there: needs the C++ part" in told


def test_without_torch_the_build_gives_way(checkout):
    (checkout / "torch.py").write_text("raise ImportError('no torch here')")
    done = build(checkout)
    assert done.returncode == 0, done.stdout
    assert "PyTorch cannot be imported while building (no torch here)" in done.stdout
    (checkout / "torch.py").unlink()
    assert "--no-build-isolation" in build_info(checkout)


def test_cuda_by_name_fails_where_it_cannot_be(checkout):
    (checkout / "cuda").mkdir()
    done = build(checkout, CUDA_HOME=str(checkout / "cuda"), MCIC_BUILD_CUDA="1")
    assert done.returncode != 0
    assert f"MCIC_BUILD_CUDA=1: no nvcc in CUDA_HOME={checkout}/cuda" in done.stdout
    done = build(checkout, MCIC_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "MCIC_BUILD_CUDA must be 0, 1 or auto, got 'yes'" in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_source_compiles_with_warnings_as_errors(checkout):
    source = checkout / "csrc" / "cuda" / "ring_push.cu"
    good = source.read_text()
    source.write_text(good.replace("int cuda_toolkit() {", "int cuda_toolkit() { int unused;"))
    done = build(checkout, MCIC_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode != 0
    assert "unused" in done.stdout
    source.write_text(good)
    done = build(checkout, MCIC_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0")
    assert done.returncode == 0, done.stdout
    assert "sm_100, sm_80, sm_90" in build_info(checkout)


def test_a_checkout_that_was_never_built_says_how(monkeypatch, tmp_path):
    from mcic.kernels import native

    monkeypatch.setattr(native, "RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(native, "load", lambda: (None, native._missing("cpu")))
    assert "C++ part: not there: it was not built: pip install" in str(native.build_info())


def test_build_info_names_versions():
    from mcic.kernels import native

    import mcic

    info = mcic.build_info()
    if native.load()[0] is None:
        assert set(info.missing) == {"cpu", "cuda"}
        return
    assert info.version == mcic.__version__
    assert info.torch.startswith("2.")
    assert info.compiler.split()[0] in ("gcc", "clang")
    assert bool(info.cuda) == bool(info.architectures) == ("cuda" not in info.missing)
