"""Gaussian filtering of scattered points in many dimensions with the permutohedral lattice.

Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010. Every point
spreads its values over the d + 1 corners of the lattice simplex that it lies in (splat), the values are blurred along
the d + 1 directions of the lattice, and every point gathers them with the same weights (slice). As in the published
code, only corners of occupied simplices exist; what the blur carries to others is lost.

All in PyTorch: one sort finds the corners that points share, splat and slice are `embedding_bag`s. So it runs on CPU
and GPU, its sums have a fixed order, and time and memory are linear in the points, but for the sort.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class PermutohedralLattice:
    """The linear operator K with K_ij ≈ exp(-|x_i - x_j|² / 2), up to a constant factor, for fixed points x.

    Attributes:
        num_corners: M, lattice points that exist.
    """

    def __init__(self, points: Tensor) -> None:
        """
        Args:
            points: f32 [N, d], in units of the Gaussian's standard deviation.

        Raises:
            ValueError: the points extend too far for the lattice's 63-bit keys.
        """
        num_points, dims = points.shape
        corners, weights = _enclosing_simplex(points)  # [N, d+1, d], [N, d+1]
        keys, steps = _pack(corners)
        ordered, order = keys.flatten().sort()
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        number = first.cumsum(0) - 1  # of the corner, for every sorted entry
        self._corner = torch.empty_like(order).scatter_(0, order, number).view(num_points, dims + 1)
        self._weight = weights
        # The entries sorted by corner: which point each comes from, and where each corner's begin.
        self._point = order // (dims + 1)
        self._point_weight = weights.flatten()[order]
        self._start = first.nonzero()[:, 0]
        self._neighbors = _neighbors(ordered[first], steps)  # [d+1, 2, M]
        self.num_corners = len(self._start)

    def filter(self, values: Tensor) -> Tensor:
        """K · values, f32 [N, C] → [N, C]."""
        lattice = F.embedding_bag(
            self._point, values, self._start, mode="sum", per_sample_weights=self._point_weight
        )  # fmt: skip
        lattice = torch.cat([lattice, lattice.new_zeros(1, lattice.shape[1])])  # the row of corners that do not exist
        for before, after in self._neighbors:
            blurred = lattice[before].add_(lattice[after]).mul_(0.5).add_(lattice[:-1])
            lattice = torch.cat([blurred, lattice[-1:]])
        return F.embedding_bag(self._corner, lattice, mode="sum", per_sample_weights=self._weight)


def _enclosing_simplex(points: Tensor) -> tuple[Tensor, Tensor]:
    """The corners around every point and its barycentric weights: int64 [N, d+1, d] (all but the last of their d+1
    coordinates, which sum to 0) and f32 [N, d+1]."""
    dims = points.shape[1]
    elevated = _elevate(points)  # [N, d+1], rows sum to 0
    # The nearest point whose coordinates are all multiples of d+1, moved back to the plane where they sum to 0.
    base = (elevated / (dims + 1)).round()
    surplus = base.sum(1, keepdim=True).long()
    rank = (elevated - base * (dims + 1)).argsort(dim=1, descending=True, stable=True).argsort(1) + surplus
    wrap = (rank < 0).long() - (rank > dims).long()
    rank = rank + wrap * (dims + 1)
    base = (base.long() + wrap) * (dims + 1)
    # Sorted by rank, the differences of neighbouring remainders are the weights.
    remainder = (elevated - base) / (dims + 1)
    falling = torch.empty_like(remainder).scatter_(1, rank, remainder)
    inner = falling[:, :-1] - falling[:, 1:]  # of corners d, d-1, … 1
    weights = torch.cat([1 - inner.sum(1, keepdim=True), inner.flip(1)], 1)
    # Corner r has remainder r in all coordinates: base + r, minus d+1 where the rank is above d - r.
    step = torch.arange(dims + 1, device=points.device)
    above = rank[:, None, :-1] > dims - step[:, None]
    corners = base[:, None, :-1] + step[:, None] - above.long() * (dims + 1)
    return corners, weights


def _elevate(points: Tensor) -> Tensor:
    """Onto the plane of ℝ^(d+1) whose coordinates sum to 0, scaled so that one pass of the blur has deviation 1."""
    dims = points.shape[1]
    axis = torch.arange(1, dims + 1, device=points.device, dtype=points.dtype)
    scaled = points * (math.sqrt(2 / 3) * (dims + 1) / (axis * (axis + 1)).sqrt())
    tail = scaled.flip(1).cumsum(1).flip(1)  # [N, d]: Σ_{k ≥ j}
    tail = torch.cat([tail, torch.zeros_like(tail[:, :1])], 1)
    own = torch.cat([torch.zeros_like(scaled[:, :1]), scaled * axis], 1)
    return tail - own


def _pack(corners: Tensor) -> tuple[Tensor, Tensor]:
    """One int64 key per corner, [N, d+1], and what a step along each of the d+1 directions adds to it, [d+1]."""
    dims = corners.shape[2]
    lowest = corners.amin((0, 1)) - (dims + 1)  # room for a step of the blur
    extent = corners.amax((0, 1)) + (dims + 1) - lowest + 1
    sizes = [int(size) for size in extent.tolist()]
    if math.prod(sizes) >= 2**63:
        raise ValueError("the image spans too many standard deviations for the lattice: use larger sigmas")
    place = [math.prod(sizes[axis + 1 :]) for axis in range(dims)]
    places = torch.tensor(place, device=corners.device)
    keys = ((corners - lowest) * places).sum(2)
    # Direction j adds d to coordinate j and takes 1 from every other; the last coordinate is not in the key.
    steps = torch.cat([(dims + 1) * places, torch.zeros_like(places[:1])]) - places.sum()
    return keys, steps


def _neighbors(keys: Tensor, steps: Tensor) -> Tensor:
    """Places of both neighbours of every corner along every direction, [d+1, 2, M]; M where there is none."""
    wanted = keys + torch.stack([-steps, steps], 1)[:, :, None]  # [d+1, 2, M]
    place = torch.searchsorted(keys, wanted)
    found = keys[place.clamp(max=len(keys) - 1)] == wanted
    return place.where(found, len(keys))
