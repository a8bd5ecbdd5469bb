"""MCIC: semantic segmentation networks from images and image-level tags."""

__version__ = "0.1.0"
