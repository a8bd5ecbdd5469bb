"""The one place where the package meets its kernels."""

from mcic.kernels import (
    BACKENDS,
    class_pool,
    describe_backends,
    pseudo_masks,
    ring_push_,
    segmentation_losses,
    sparse_attention,
)
from mcic.kernels.class_pool.reference import pool_weights
from mcic.kernels.native import BuildInfo, build_info
from mcic.kernels.pseudo_masks.reference import (
    IGNORE,
    cam_scores,
    context_scores,
    mask_from_scores,
    merge_masks,
    normalized_heatmap,
    with_background,
)
from mcic.kernels.ring_push import rejected_labels
from mcic.kernels.segmentation_losses.reference import labelled_pixels
from mcic.kernels.sparse_attention.reference import attention_weights

__all__ = [
    "BACKENDS",
    "IGNORE",
    "BuildInfo",
    "attention_weights",
    "build_info",
    "cam_scores",
    "class_pool",
    "context_scores",
    "describe_backends",
    "labelled_pixels",
    "mask_from_scores",
    "merge_masks",
    "normalized_heatmap",
    "pool_weights",
    "pseudo_masks",
    "rejected_labels",
    "ring_push_",
    "segmentation_losses",
    "sparse_attention",
    "with_background",
]
