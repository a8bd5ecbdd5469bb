"""Which rows of the bank an image reads, worked out by every kernel in registers: no list in memory, no gather.

Image b reads its entries j = 0 … n_b-1 in the order of classes and, within a class, of slots. Entry j is row
k·S + s of the bank.
"""

import triton
import triton.language as tl


@triton.jit
def class_sizes(
    class_mask_ptr,  # bool [B, K]
    counts_ptr,  # i32 [K]
    i_b,
    o_k,
    K,
    S,
):
    """How many entries image `i_b` reads of each class `o_k`: its stored slots, or 0 if the class is not its own."""
    m_k = o_k < K
    b_mask = tl.load(class_mask_ptr + i_b.to(tl.int64) * K + o_k, mask=m_k, other=0)
    b_counts = tl.load(counts_ptr + o_k, mask=m_k, other=0)
    return tl.where(b_mask != 0, tl.maximum(tl.minimum(b_counts, S), 0), 0)


@triton.jit
def num_entries(class_mask_ptr, counts_ptr, i_b, K, S, BLOCK_K: tl.constexpr):
    """n_b, the number of entries that image `i_b` reads."""
    n = 0
    for i_k in range(0, K, BLOCK_K):
        n += tl.sum(class_sizes(class_mask_ptr, counts_ptr, i_b, i_k + tl.arange(0, BLOCK_K), K, S))
    return n


@triton.jit
def entry_rows(class_mask_ptr, counts_ptr, i_b, o_j, K, S, BLOCK_K: tl.constexpr):
    """Rows k·S + s of the entries `o_j` [J] of image `i_b`, int64, 0 where `o_j` ≥ n_b; and n_b."""
    n = 0
    b_class = tl.zeros_like(o_j)
    b_start = tl.zeros_like(o_j)  # first entry of that class
    for i_k in range(0, K, BLOCK_K):
        b_sizes = class_sizes(class_mask_ptr, counts_ptr, i_b, i_k + tl.arange(0, BLOCK_K), K, S)
        b_ends = n + tl.cumsum(b_sizes, 0)
        m_before = b_ends[None, :] <= o_j[:, None]  # classes that end before entry j, empty ones among them
        b_class += tl.sum(m_before.to(tl.int32), 1)
        b_start += tl.sum(tl.where(m_before, b_sizes[None, :], 0), 1)
        n += tl.sum(b_sizes)
    b_rows = b_class.to(tl.int64) * S + (o_j - b_start)
    return tl.where(o_j < n, b_rows, 0), n
