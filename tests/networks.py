"""A small network with random weights, and pictures for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mcic.checkpoint import save_network
from mcic.data.palette import voc_palette
from mcic.model import NetworkSpec, SegmentationNetwork

CLASSES = ("ant", "cat", "dog")


def save_random_network(folder: Path) -> None:
    """An exported network of `CLASSES`, whose scores differ from place to place."""
    torch.manual_seed(3)
    network = SegmentationNetwork(NetworkSpec("tiny", None, "linear", len(CLASSES) + 1)).eval()
    with torch.no_grad():
        scores = network(torch.randn(1, 3, 97, 97))
        network.segmentation_head.bias -= scores.mean((0, 2, 3))
    save_network(folder, network, classes=CLASSES, palette=voc_palette(4).tolist())


def photo(height=60, width=75, seed=0) -> np.ndarray:
    """uint8 [H, W, 3]: colours that change slowly, with a little noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth // 2 + random.integers(0, 60, smooth.shape)).astype(np.uint8)
