"""The optional extension `_C` (source in csrc/): loaded when an operation first asks for it, and what was built."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .registry import Request

RECORD = Path(__file__).parent / "_build.json"
"""what setup.py left behind: the version, and for each part that is missing why"""


@dataclass(frozen=True)
class BuildInfo:
    """What of the native code there is; printed, it is a few lines of text.

    Attributes:
        version: of MCIC when it was built; None where the build never ran.
        torch: version of PyTorch that it was built against; None without the extension.
        compiler: of the C++ code; None without the extension.
        cuda: version of the CUDA toolkit; None without the CUDA part.
        architectures: of GPUs, `sm_90` for machine code and `compute_90` for PTX.
        missing: part that is not there (`cpu`, `cuda`) → why.
    """

    version: str | None
    torch: str | None = None
    compiler: str | None = None
    cuda: str | None = None
    architectures: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        cpu, cuda = (f"not there: {self.missing.get(part)}" for part in ("cpu", "cuda"))
        if "cpu" not in self.missing:
            cpu = f"{self.compiler}, PyTorch {self.torch}"
        if "cuda" not in self.missing:
            cuda = f"toolkit {self.cuda}, {', '.join(self.architectures)}"
        return f"mcic {self.version or '(version unknown)'}\nC++ part: {cpu}\nCUDA part: {cuda}"


def build_info() -> BuildInfo:
    """What of the native code was built, with what, and why the rest was not."""
    extension, reason = load()
    record = _record()
    if extension is None:
        return BuildInfo(record.get("version"), missing={"cpu": reason, "cuda": _missing("cuda", reason)})
    missing = {} if extension.cuda else {"cuda": _missing("cuda")}
    architectures = tuple(extension.architectures.split()) if extension.cuda else ()
    return BuildInfo(
        extension.version, extension.torch, extension.compiler, extension.cuda, architectures, missing=missing
    )


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension, which registers its operations with PyTorch, and ""; or None and why it cannot be used."""
    name = f"{__package__}._C"
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None, _missing("cpu")
    except ImportError as error:
        return None, f"the extension does not load here, install MCIC again: {error}"


def runs_native(request: Request) -> tuple[bool, str]:
    """Whether the extension has the part for the request's device."""
    extension, reason = load()
    if extension is None:
        return False, reason
    if request.device.type == "cpu":
        return True, "C++"
    if request.device.type != "cuda":
        return False, "the native code runs on CPUs and CUDA devices"
    if extension.cuda is None:
        return False, _missing("cuda")
    major, minor = torch.cuda.get_device_capability(request.device)
    if not any(_serves(architecture, major, minor) for architecture in extension.architectures.split()):
        return False, (
            f"built for {extension.architectures}, this GPU is sm_{major}{minor}: "
            f"install again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return True, f"CUDA {extension.cuda}"


def _serves(architecture: str, major: int, minor: int) -> bool:
    kind, _, number = architecture.partition("_")
    exact = number.rstrip("af") != number  # sm_90a: code for that architecture alone
    built = divmod(int(number.rstrip("af")), 10)
    if exact:
        return built == (major, minor)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def _record() -> dict:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def _missing(part: str, reason: str = "") -> str:
    """Why a part is not there, as the build saw it; where it saw nothing, `reason`."""
    return (
        _record().get("missing", {}).get(part)
        or reason
        or ("it was not built: pip install --no-build-isolation -e . in the checkout, with a C++ compiler")
    )
