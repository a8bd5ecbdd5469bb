"""The one place where the package meets its kernels."""

from mcic.kernels import BACKENDS, class_pool, describe_backends, ring_push_, sparse_attention
from mcic.kernels.class_pool.reference import pool_weights
from mcic.kernels.sparse_attention.reference import attention_weights

__all__ = [
    "BACKENDS",
    "attention_weights",
    "class_pool",
    "describe_backends",
    "pool_weights",
    "ring_push_",
    "sparse_attention",
]
