"""Who computes an operation: by name or not at all, the fastest that can run otherwise, and never the interpreter."""

import dataclasses
import logging

import pytest
import torch
from mcic.kernels import registry

CPU = torch.device("cpu")
FUSED = ("sparse_attention", "class_pool", "pseudo_masks", "segmentation_losses")


def chosen(operation, backend, dtype=torch.float32):
    return registry._choose.__wrapped__(operation, backend, CPU, dtype)


def test_auto_never_picks_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [chosen(name, "auto") for name in FUSED] == ["reference"] * 4


def test_an_operation_without_the_backend_takes_its_own_fastest():
    assert chosen("class_pool", "native") == "reference"


@pytest.mark.parametrize("name", FUSED)
def test_a_backend_asked_for_by_name_runs_or_raises(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"{name} cannot run on cpu .*Triton needs a GPU"):
        chosen(name, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"{name} cannot run on cpu in torch.float64 as asked .*no fp64"):
        chosen(name, "triton", torch.float64)


def test_a_push_without_a_compiler(monkeypatch):
    push = registry.OPERATIONS["ring_push_"]
    broken = dataclasses.replace(push.implementations[0], usable=lambda _: (False, "no compiler"))
    monkeypatch.setattr(push, "implementations", (broken, *push.implementations[1:]))
    with pytest.raises(ValueError, match="no compiler"):
        chosen("ring_push_", "native")
    assert chosen("ring_push_", "auto") == "reference"


def test_the_choice_is_said_once_and_why(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry._choose.cache_clear()
    with caplog.at_level(logging.INFO, "mcic.kernels"):
        for _ in range(3):
            registry.choose("class_pool", "auto", CPU, torch.float32)
    registry._choose.cache_clear()
    (record,) = caplog.records
    assert record.getMessage() == "class_pool on cpu: reference: plain PyTorch; triton: Triton needs a GPU"
