"""The hot path of MCIC: five operations, each with a plain PyTorch reference and faster backends.

This package is the only door: it depends on torch alone, loads nothing else until an operation asks for it, and
knows nothing of the rest of `mcic`.

Shape letters, everywhere: B images · K classes, 0 is background · L = K - 1 object classes · S slots per class ·
N = H·W pixels · D feature channels · E value channels · R rows of a push · P logit maps · M masks.
"""

from .class_pool import class_pool
from .pseudo_masks import pseudo_masks
from .registry import BACKENDS, describe_backends
from .ring_push import ring_push_
from .segmentation_losses import segmentation_losses
from .sparse_attention import sparse_attention

__all__ = [
    "BACKENDS",
    "class_pool",
    "describe_backends",
    "pseudo_masks",
    "ring_push_",
    "segmentation_losses",
    "sparse_attention",
]
