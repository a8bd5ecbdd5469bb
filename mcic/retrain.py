"""The second stage of the field: a plain segmentation network, trained on the masks that the first stage made."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from mcic.config import Config
from mcic.config_io import load_config

logger = logging.getLogger(__name__)

FOLDER = "retrain"
"""where in a run's folder the second stage is kept"""


def retrain_config(run: Path) -> Config:
    """The configuration of a run's second stage: its data, network and schedule, its masks in the place of the tags.

    The network starts from the backbone's initial weights again, and its loss is the cross-entropy at the pixels of
    the crop, weighted with the masks' confidence and without the pixels that they ignore. It is kept in `RUN/retrain`.
    Where the backbone had none, it starts from what `run.init_from` named, as the run did.
    """
    config = load_config(run / "config.yaml")
    start = config.run.init_from if config.model.weights == "none" else None
    if start is not None and not Path(start).is_dir():
        logger.warning(
            "%s, from which the run began, is gone: a second stage that begins now starts from random weights", start
        )
        start = None
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, masks=str(run / "masks"), saliency="none", calibration=None),
        method=dataclasses.replace(config.method, supervision="masks", context="none"),
        eval=dataclasses.replace(config.eval, mask_images=0),
        run=dataclasses.replace(config.run, dir=str(run / FOLDER), resume="none", init_from=start, previews=0),
    )
