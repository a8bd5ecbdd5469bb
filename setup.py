"""Build script: the optional native operations (csrc/); everything that needs no code lives in pyproject.toml.

Without PyTorch, a compiler or nvcc the package installs all the same and runs on PyTorch alone; what is missing, and
why, is printed, and kept for `mcic.build_info()`. Environment:

    MCIC_BUILD_CUDA       auto (default): the CUDA part where nvcc is found and PyTorch can use it; 0: never; 1: always,
                          and the installation fails where that cannot be
    TORCH_CUDA_ARCH_LIST  GPUs to build for, as PyTorch reads it ("8.0;9.0+PTX"); else those of this machine, and
                          without any the architectures of `ARCHITECTURES`
    MAX_JOBS              compilations at a time
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except (ImportError, OSError) as error:
    torch, without_torch, Build = None, str(error), build_ext
else:
    Build = cpp_extension.BuildExtension

ARCHITECTURES = ("80", "90", "100")
CPU_SOURCES = ["csrc/ops.cpp", "csrc/cpu/ring_push.cpp"]
CUDA_SOURCE = Path("csrc/cuda/ring_push.cu")
HEADER = Path("csrc/ring_push.h")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


class CannotBuildError(Exception):
    """A part cannot be built here; the message says why."""


class BuildNative(Build):
    """Builds what can be built, and leaves a record of what could not."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if torch is not None:  # one place for every kind of installation, so that the next one finds the objects
            self.build_temp = f"build/native-{sys.implementation.cache_tag}-torch-{torch.__version__}"
        self.force = True  # other settings make another extension of the same sources

    def run(self) -> None:
        self.missing = {}
        super().run()
        folder = Path(self.get_ext_fullpath(EXTENSION.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        record = {"version": self.distribution.get_version(), "missing": self.missing}
        (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        if "cpu" in self.missing:  # what an earlier build left would contradict the record
            Path(self.get_ext_fullpath(EXTENSION.name)).unlink(missing_ok=True)
        for part, reason in self.missing.items():
            print(f"mcic: without the native {part} part: {reason}", file=sys.stderr)

    def build_extensions(self) -> None:
        wish = os.environ.get("MCIC_BUILD_CUDA", "auto")
        if wish not in ("0", "1", "auto"):
            raise SystemExit(f"MCIC_BUILD_CUDA must be 0, 1 or auto, got {wish!r}")
        try:
            self._build(wish)
        except Exception as error:  # any fault of a toolchain: the package is whole without it
            if wish == "1":
                raise SystemExit(f"MCIC_BUILD_CUDA=1: {_told(error)}") from error
            hint = "" if isinstance(error, CannotBuildError) else "; pip install -v shows what the compiler said"
            self.missing = {"cpu": _told(error) + hint, "cuda": self.missing.get("cuda", "needs the C++ part")}
            self.extensions = []

    def _build(self, wish: str) -> None:
        if torch is None:
            raise CannotBuildError(
                f"PyTorch cannot be imported while building ({without_torch}); "
                "install it first, then use pip install --no-build-isolation -e ."
            )
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise CannotBuildError(f"no C++ compiler: {compiler!r} is not on PATH; install one or set CXX")
        headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        EXTENSION.extra_compile_args += [
            *headers,
            *WARNINGS,
            "-O2",
            "-g0",
            f'-DMCIC_VERSION="{self.distribution.get_version()}"',
        ]
        EXTENSION.library_dirs += cpp_extension.library_paths()
        names = ("extra_objects", "extra_compile_args", "library_dirs", "libraries", "extra_link_args")
        without_cuda = {name: list(getattr(EXTENSION, name)) for name in names}
        try:
            self._add_cuda(wish)
        except CannotBuildError as error:
            if wish == "1":
                raise
            self.missing["cuda"] = str(error)
        try:
            super().build_extensions()
        except Exception as error:
            if wish == "1" or "cuda" in self.missing:
                raise
            self.missing["cuda"] = _told(error)  # its part may be what does not link
            for name, value in without_cuda.items():
                setattr(EXTENSION, name, value)
            super().build_extensions()

    def _add_cuda(self, wish: str) -> None:
        """Compile the kernel with a command of our own: it needs nothing of PyTorch, not even its CUDA build."""
        if wish == "0":
            raise CannotBuildError("switched off by MCIC_BUILD_CUDA=0")
        if wish == "auto" and torch.version.cuda is None:
            raise CannotBuildError("PyTorch here is built without CUDA; MCIC_BUILD_CUDA=1 builds it all the same")
        nvcc = find_nvcc()
        flags = architecture_flags(nvcc)
        built_for = " ".join(re.findall(r",code=(\w+)", " ".join(flags)))
        EXTENSION.extra_objects.append(str(compile_cuda(nvcc, flags, Path(self.build_temp))))
        EXTENSION.extra_compile_args.append(f'-DMCIC_CUDA="{built_for}"')
        EXTENSION.library_dirs += cuda_libraries(nvcc)
        EXTENSION.libraries += ["cudart_static", "rt", "pthread", "dl"]
        EXTENSION.extra_link_args.append("-Wl,--exclude-libs,ALL")  # PyTorch brings its own CUDA runtime
        if torch.version.cuda is not None:
            EXTENSION.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and not home and cpp_extension.CUDA_HOME:  # where toolkits mostly are
        nvcc = shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    if nvcc is None:
        raise CannotBuildError(
            f"no nvcc {f'in CUDA_HOME={home}' if home else 'on PATH'}: install the CUDA toolkit, "
            "or set CUDA_HOME to its folder"
        )
    return nvcc


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags as PyTorch derives them, from the environment or the GPUs here; else for `ARCHITECTURES`."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        try:
            return cpp_extension._get_cuda_arch_flags()
        except ValueError as error:
            raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST: {error}") from error
    known = run([nvcc, "--list-gpu-arch"]).split()
    numbers = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    if not numbers:
        raise CannotBuildError(f"{nvcc} knows none of the architectures {', '.join(map(str, ARCHITECTURES))}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def compile_cuda(nvcc: str, flags: list[str], folder: Path) -> Path:
    """The object file of the CUDA source; compiled unless the one from last time is still right."""
    target = folder.resolve() / "ring_push_cuda.o"
    command = [nvcc, "-c", str(CUDA_SOURCE), "-o", str(target), "-std=c++17", "-O3", *flags]
    command += ["--threads", os.environ.get("MAX_JOBS", "0"), "-Werror", "all-warnings"]
    command += ["-Xcompiler", ",".join(["-fPIC", *WARNINGS])]
    made_by = target.with_suffix(".command")
    newest = max(source.stat().st_mtime for source in (CUDA_SOURCE, HEADER))
    same = made_by.is_file() and made_by.read_text() == str(command)
    if not (same and target.is_file() and target.stat().st_mtime > newest):
        target.parent.mkdir(parents=True, exist_ok=True)
        run(command)
        made_by.write_text(str(command))
    return target


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders in which nvcc itself would look for the CUDA runtime."""
    plan = run([nvcc, "--dryrun", "-c", str(CUDA_SOURCE)])
    return re.findall(r'"-L([^"]+)"', plan)


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise CannotBuildError(f"{command[0]} failed: {_told(done.stdout)}")
    return done.stdout


def _told(what: object) -> str:
    """The first line that has something to say; the whole went to the terminal (pip shows it with -v)."""
    lines = [line.strip() for line in str(what).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(what).__name__)


EXTENSION = Extension(
    "mcic.kernels._C",
    CPU_SOURCES,
    libraries=["c10", "torch_cpu"],
    depends=[str(HEADER), str(CUDA_SOURCE)],
    language="c++",
)

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildNative})
