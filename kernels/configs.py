"""Block sizes of the Triton kernels: tables by architecture, never measured at run time but by `python -m bench.tune`.

`tables/<architecture>.json` maps kernel → element bits ("16", "32") → launch configuration: the kernel's block sizes
and `num_warps`, `num_stages`. The architecture `interpreter` is Triton's, with small blocks so that loops iterate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tables"

_forced: str | None = None


def config(kernel: str, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration of a kernel for inputs of `dtype` on `device`.

    Raises:
        KeyError: a kernel without an entry.
    """
    return table(architecture(device))[kernel][str(dtype.itemsize * 8)]


def architecture(device: torch.device) -> str:
    """The table that `device` uses: that of the newest architecture not newer than it."""
    if _forced is not None:
        return _forced
    if device.type == "cpu":
        return "interpreter"
    return _nearest(*torch.cuda.get_device_capability(device))


@contextmanager
def compile_for(name: str) -> Iterator[None]:
    """Within, configurations are those of architecture `name` (`sm_90`), whatever the device."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def table(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """The table of an architecture."""
    return json.loads((TABLES / f"{name}.json").read_text())


@cache
def _nearest(major: int, minor: int) -> str:
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    return f"sm_{max((k for k in known if k <= major * 10 + minor), default=known[0])}"


def store(name: str, kernel: str, bits: str, configuration: dict[str, int]) -> None:
    """Write one entry of the table of architecture `name`; the file is made if it is new."""
    path = TABLES / f"{name}.json"
    entries = json.loads(path.read_text()) if path.is_file() else {}
    entries.setdefault(kernel, {})[bits] = configuration
    lines = [
        f' "{kernel}": {{\n'
        + ",\n".join(f'  "{bits}": {json.dumps(entry)}' for bits, entry in sorted(by_bits.items()))
        + "\n }"
        for kernel, by_bits in sorted(entries.items())
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)  # whoever is killed while tuning leaves a whole table
    table.cache_clear()
