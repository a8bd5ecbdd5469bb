"""What a network learns from: tags, or masks and where they come from."""

from __future__ import annotations

from pathlib import Path

from mcic.calibrate import read_calibration
from mcic.checkpoint import used_ground_truth
from mcic.config import Config
from mcic.data import Dataset, GroundTruth, SavedMasks, Targets


def build_targets(config: Config, train: Dataset) -> Targets | None:
    """The masks that supervise, or None where tags do.

    Raises:
        ValueError: there are none.
    """
    if config.method.supervision == "tags":
        return None
    if config.method.supervision == "full":
        if all(train.mask(index) is None for index in range(len(train))):
            raise ValueError("--method.supervision full needs ground-truth masks: no training image has one")
        return GroundTruth()
    if config.data.masks is None:
        raise ValueError("--method.supervision masks needs --data.masks, the folder that `mcic masks` wrote")
    return SavedMasks(Path(config.data.masks), train)


def uses_ground_truth(config: Config, targets: Targets | None, *, stored: Config | None = None) -> bool:
    """Whether masks that people drew train this network, chose a threshold, or trained what it starts from.

    Of a run that goes on, with the configuration `stored`, its checkpoint says so of what it began with.
    """
    calibration, start = config.data.calibration, config.run.init_from
    if stored is not None:
        start = None
        calibration = None if stored.data.calibration == calibration else calibration
    if calibration is not None and read_calibration(Path(calibration))["ground_truth_used"]:
        return True
    if start is not None and used_ground_truth(Path(start)):
        return True
    if isinstance(targets, SavedMasks):
        return bool(targets.manifest.get("ground_truth_used"))
    return targets is not None
