"""`env.json`: with what and where a run was made, so that its figures can be understood later."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mcic import __version__

_PACKAGES = ("torch", "triton", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, machine and command line, ready for JSON; what cannot be found out is None."""
    import torch

    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "mcic": __version__,
        "git_commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cuda_devices": [_device(i) for i in range(torch.cuda.device_count())],
    }


def git_commit(package: Path) -> str | None:
    """Commit of the checkout that tracks `package`, with "-dirty" if tracked files were changed.

    Without one, as in a copy that was made without .git, what MCIC_COMMIT says, or None.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return os.environ.get("MCIC_COMMIT")  # also where the package is installed inside somebody else's checkout
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    """The processor's name as the kernel gives it; `platform.processor` is often empty on Linux."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }
