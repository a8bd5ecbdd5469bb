"""Backbones, heads, memory bank and propagation. Imports no data and no trainer."""

from mcic.model.network import MCIC, Augmented, Contexts, NetworkSpec, Prediction, SegmentationNetwork, feature_valid

__all__ = ["MCIC", "Augmented", "Contexts", "NetworkSpec", "Prediction", "SegmentationNetwork", "feature_valid"]
