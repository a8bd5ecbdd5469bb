"""From a configuration to the objects of a run: each component gets the fields it needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mcic import distributed
from mcic.config import Config, MethodConfig, ModelConfig
from mcic.model import MCIC, NetworkSpec

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""names of number formats in the configuration"""


def build_model(model: ModelConfig, method: MethodConfig, *, num_classes: int, backend: str) -> MCIC:
    """The model for resolved `model` and `method` fields and K classes.

    Raises:
        ValueError: weights that cannot be loaded, heads that do not divide the channels, an unknown output stride.
    """
    spec = NetworkSpec(model.backbone, model.output_stride, model.segmentation_head, num_classes)
    return MCIC(
        spec,
        weights=model.weights,
        classification=model.classification_head,
        bank=method.context == "bank" and method.supervision == "tags",
        slots=method.slots,
        bank_dtype=PRECISIONS[method.bank_precision],
        heads=method.heads,
        temperature=method.temperature,
        attention_threshold=method.attention_threshold,
        dropout=method.dropout,
        message_gain=method.message_gain,
        pool_threshold=method.pool_threshold,
        confidence_rule=method.confidence_rule,
        pixel_bank=method.pixel_bank,
        stop_gradient=method.stop_gradient,
        classify_context=method.context_head == "classification",
        ema_momentum=method.ema_momentum,
        backend=backend,
    )


def choose_device(name: str) -> torch.device:
    """`run.device` as a torch device; `auto` is this rank's GPU where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--run.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"--run.device {name}: this machine shows PyTorch no GPU; use --run.device cpu")
    if device.index is None:
        return torch.device("cuda", distributed.local_rank() % count)
    if device.index >= count:
        raise ValueError(f"--run.device {name}: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def available_memory(device: torch.device) -> int:
    """Bytes that are free: on the GPU, or in this machine for new processes, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what the kernel would give back, which sysconf does not
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def seed_everything(config: Config) -> None:
    """Seed what draws initial weights; deterministic mode refuses operations that have no deterministic form."""
    torch.manual_seed(config.train.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)  # off, too: a run before this one may have set it
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be repeatable
        torch.backends.cudnn.benchmark = False


@contextmanager
def in_words(device: torch.device, advice: str) -> Iterator[None]:
    """Within it, what PyTorch refuses at run time is an error that a person can act on.

    Args:
        device: where the work is done.
        advice: what to do where its memory does not hold the work.

    Raises:
        ValueError: not enough memory, or an operation that has no deterministic form and deterministic mode is on.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said:  # the last: CPU
            raise ValueError(f"the memory of {device} does not hold this: {advice}") from error
        operation, refused, _ = said.partition(" does not have a deterministic implementation")
        if refused:
            raise ValueError(f"--train.deterministic: {operation} has no deterministic form on {device}; "
                             "--train.no-deterministic allows it") from error  # fmt: skip
        raise
