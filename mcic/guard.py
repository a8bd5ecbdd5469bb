"""What happens after an update that was skipped because its gradient was not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file

from mcic.data import Batch, Dataset
from mcic.durable import write_text, write_with

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Keeps the batch of every skipped update for replay, and ends the run when too many follow each other.

    Args:
        folder: where batches are kept, as `step-<step>.safetensors` (the fields of `Batch`) and `.json`.
        limit: skipped updates in a row that end the run.
        dataset: names the images.
        batch_of: step → the batch that it computed with, made again.

    Attributes:
        streak: skipped updates in a row so far.
    """

    def __init__(self, folder: Path, *, limit: int, dataset: Dataset, batch_of: Callable[[int], Batch]) -> None:
        self.folder = folder
        self.limit = limit
        self.dataset = dataset
        self.batch_of = batch_of
        self.streak = 0

    def check(self, skipped: Mapping[int, bool], metrics: Mapping[str, float | None]) -> None:
        """Take note of the steps since the last call.

        Args:
            skipped: step → whether its update was skipped, in order.
            metrics: of the last of these steps.

        Raises:
            ValueError: the limit is reached; names the loss terms and the images.
        """
        for step, was_skipped in skipped.items():
            self.streak = self.streak + 1 if was_skipped else 0
            if was_skipped:
                last = step == max(skipped)
                terms = [name for name, value in metrics.items() if last and not _finite(value)]
                names = self._keep(step, terms)
                said = f" ({', '.join(terms)})" if terms else ""
                message = f"step {step}: the gradient is not finite{said}; images {', '.join(names)}"
                if self.streak >= self.limit:
                    raise ValueError(
                        f"{message}. That is the {self.streak}th in a row (--train.max-nonfinite): the run ends, its "
                        f"weights and last checkpoint are whole. The batches are in {self.folder}; a lower --train.lr, "
                        "--train.clip-grad or --train.precision fp32 may help"
                    )
                logger.warning("%s. The update was skipped, the batch is kept in %s", message, self.folder)

    def _keep(self, step: int, terms: list[str]) -> list[str]:
        """Write the batch; returns the ids of its images."""
        batch = self.batch_of(step)
        names = [self.dataset.ids[index] for index in batch.indices.tolist()]
        tensors = {name: getattr(batch, name) for name in Batch.__slots__}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_with(
            self.folder / f"step-{step:08d}.safetensors",
            lambda path: save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path),
        )
        facts = {"step": step, "images": names, "not_finite": terms}
        write_text(self.folder / f"step-{step:08d}.json", json.dumps(facts, indent=1, ensure_ascii=False))
        return names


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
