"""Schedules: pure functions of the step."""

from __future__ import annotations


def ramp_up(step: float, total: float, *, power: int = 1) -> float:
    """λ of E15: `(3x² - 2x³) ** power` with x = step / total, 1 from `total` on (and everywhere if total ≤ 0)."""
    if step >= total:
        return 1.0
    x = max(step, 0) / total
    return (3 * x**2 - 2 * x**3) ** power


def poly(step: int, total: int, *, power: float = 0.9) -> float:
    """Factor of the learning rate: `(1 - step / total) ** power`, 0 from `total` on."""
    return max(0.0, 1 - step / total) ** power


def warm_up(step: int, total: int) -> float:
    """Factor of the learning rate that grows linearly to 1 over `total` steps; 1 everywhere if total is 0."""
    return min(1.0, (step + 1) / total) if total else 1.0
