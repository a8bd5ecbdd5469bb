"""Intersection over union from an exact confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from mcic import distributed
from mcic.pseudo import IGNORE


class ConfusionMatrix:
    """Counts of (true class, predicted class) over pixels, int64 [K, K]; rows are the truth.

    Pixels whose truth is 255 are left out. Predicted 255 (a mask's ignore) counts as background, and the share of
    pixels that are not is kept as the coverage.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.covered = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add pixels: two integer tensors of one shape, values 0…K-1 or 255."""
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction is {list(prediction.shape)}, truth {list(truth.shape)}: expected one shape")
        known = truth != IGNORE
        prediction, truth = prediction[known].long(), truth[known].long()
        ignored = prediction == IGNORE
        self.covered += (~ignored).sum()
        cells = truth * self.num_classes + prediction.masked_fill(ignored, 0)
        self.counts += torch.bincount(cells, minlength=self.num_classes**2).view_as(self.counts)

    def reduce(self) -> None:
        """Add up the counts of all ranks."""
        distributed.sum_(self.counts)
        distributed.sum_(self.covered)

    def iou(self) -> list[float | None]:
        """Per-class IoU in percent; None for a class that does not occur in the truth."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        occurs = self.counts.sum(1) > 0
        return [
            100 * hit / total if there else None
            for hit, total, there in zip(hits.tolist(), union.tolist(), occurs.tolist(), strict=True)
        ]

    def miou(self) -> float | None:
        """Mean IoU in percent over the classes that occur in the truth; None where none does."""
        known = [value for value in self.iou() if value is not None]
        return sum(known) / len(known) if known else None

    def coverage(self) -> float | None:
        """Percent of the pixels with truth that the mask does not ignore; None where there is no truth."""
        total = self.counts.sum().item()
        return 100 * self.covered.item() / total if total else None
