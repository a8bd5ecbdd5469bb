"""What happens after an update that was skipped because its gradient was not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from mcic import distributed
from mcic.checkpoint import write_tensors
from mcic.data import Batch, Dataset
from mcic.durable import optional, write_text, write_with

logger = logging.getLogger(__name__)

HALVINGS = 16
"""of the scale of fp16, from where it begins to 1: so often in a row its gradient overflows where nothing is wrong"""


class NonFiniteGuard:
    """Keeps the batch of every skipped update for replay, and ends the run when too many follow each other.

    Args:
        folder: where batches are kept, as `step-<step>.safetensors` (the fields of `Batch`) and `.json`; of several
            processes each keeps its share, `step-<step>-rank-<rank>`.
        limit: skipped updates in a row that end the run.
        dataset: names the images.
        batch_of: step → the batch that it computed with, made again.
        scaled: the loss is scaled (fp16). That the gradient alone is not finite is then the scale's way to its place.

    Attributes:
        streak: skipped updates in a row so far.
    """

    def __init__(
        self, folder: Path, *, limit: int, dataset: Dataset, batch_of: Callable[[int], Batch], scaled: bool = False
    ) -> None:
        self.folder = folder
        self.limit = limit
        self.dataset = dataset
        self.batch_of = batch_of
        self.scaled = scaled
        self.streak = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of a step; `metrics` are over all ranks, `skipped` among them: not 0 if its update was skipped.

        Raises:
            ValueError: the limit is reached; names the loss terms and the images.
        """
        if not metrics["skipped"]:
            self.streak = 0
            return
        self.streak += 1
        terms = [name for name, value in metrics.items() if not math.isfinite(value)]
        overflow = self.scaled and terms == ["grad_norm"]
        limit = self.limit + HALVINGS * overflow
        if overflow and self.streak < limit:
            logger.info("step %d: the gradient overflows fp16; the update was skipped, its scale is halved", step)
            return
        names = self._keep(step, terms)
        said = f" ({', '.join(terms)})" if terms else ""
        message = f"step {step}: the gradient is not finite{said}; images {', '.join(names)}"
        if self.streak >= limit:
            raise ValueError(
                f"{message}. These are {self.streak} in a row (--train.max-nonfinite): the run ends, its weights and "
                f"last checkpoint are whole. The batches are in {self.folder}; a lower --train.lr, "
                "--train.clip-grad or --train.precision fp32 may help"
            )
        logger.warning("%s. The update was skipped, the batch is kept in %s", message, self.folder)

    def _keep(self, step: int, terms: list[str]) -> list[str]:
        """Write the batch; returns the ids of its images."""
        batch = self.batch_of(step)
        names = [self.dataset.ids[index] for index in batch.indices.tolist()]
        tensors = {name: getattr(batch, name) for name in Batch.__slots__}
        stem = f"step-{step:08d}" + (f"-rank-{distributed.rank()}" if distributed.world_size() > 1 else "")
        facts = {"step": step, "images": names, "not_finite": terms}
        with optional(self.folder):
            self.folder.mkdir(exist_ok=True)
            kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            write_with(self.folder / f"{stem}.safetensors", lambda path: write_tensors(kept, path))
            write_text(self.folder / f"{stem}.json", json.dumps(facts, indent=1, ensure_ascii=False))
        return names
