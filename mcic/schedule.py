"""Schedules: pure functions of the step."""

from __future__ import annotations


def ramp_up(step: float, total: float, *, power: int = 1) -> float:
    """λ of E15: `(3x² - 2x³) ** power` with x = step / total, 1 from `total` on (and everywhere if total ≤ 0)."""
    if step >= total:
        return 1.0
    x = max(step, 0) / total
    return (3 * x**2 - 2 * x**3) ** power


def poly(step: int, total: int, *, power: float = 0.9, warmup: int = 0) -> float:
    """Factor of the learning rate: linear from 0 over `warmup` steps, times (1 - step / total) ** power."""
    growth = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return growth * max(0.0, 1 - step / total) ** power
