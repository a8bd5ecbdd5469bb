"""From a configuration to the objects of a run: each component gets the fields it needs."""

from __future__ import annotations

import os

import torch

from mcic import distributed
from mcic.config import Config, MethodConfig, ModelConfig
from mcic.model import MCIC, NetworkSpec


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
        heads=method.heads,
        temperature=method.temperature,
        attention_threshold=method.attention_threshold,
        dropout=method.dropout,
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
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--run.device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--run.device {name}: this machine shows PyTorch no GPU; use --run.device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
    return device


def seed_everything(config: Config) -> None:
    """Seed what draws initial weights; deterministic mode refuses operations that have no deterministic form."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be repeatable
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
