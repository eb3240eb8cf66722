"""How far rounding may turn singular subspaces, by first-order perturbation theory from the singular values.

An error E of the matrix mixes two singular directions by at most ``|E| / |s_i - s_j|`` (Stewart and Sun, "Matrix
Perturbation Theory", 1990, section V.4). No float64 SVD can do better than E = eps times the largest singular value;
a Gram matrix, whose gaps are those of the squares, loses ``s_1 / s_k`` times more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EPS = 2.0**-53

# Bound of the errors of singular values (or eigenvalues), relative to the largest.
BACKWARD_ERROR = 8 * EPS


@dataclass(frozen=True, repr=False)
class Cut:
    """Where a matrix's singular directions were cut off, and how accurate they are there.

    Attributes:
        values: (n,) float64, all singular values, falling, in any unit.
        rank: k, the number of directions that were kept.
        measured: estimated sine of the angle to the exact subspace that backward errors do not explain.
        spread: backward error beyond that of an SVD, relative to the largest singular value.
        inherent: the part of `spread` that no other solver could avoid, because the matrix itself is only known so far.
        edge: whether rounding decided how many directions there are.
    """

    values: Tensor
    rank: int
    measured: float = 0.0
    spread: float = 0.0
    inherent: float = 0.0
    edge: bool = False

    def __repr__(self) -> str:
        return f"Cut(rank {self.rank} of {len(self.values)}, gap {self.gap:.1g})"

    @property
    def gap(self) -> float:
        """``(s_k - s_(k+1)) / s_k``: 0 for a tie, 1 where nothing is cut off."""
        if not 0 < self.rank < len(self.values) or float(self.values[self.rank - 1]) == 0:
            return 1.0
        last, next_one = self.values[self.rank - 1], self.values[self.rank]
        return max(0.0, float((last - next_one) / last))

    @property
    def mixing(self) -> float:
        """Estimated largest sine by which neighbours among the kept directions may be turned into each other."""
        if self.rank < 2:
            return BACKWARD_ERROR
        gaps = (self._scaled[: self.rank - 1] - self._scaled[1 : self.rank]).clamp(min=0)
        return float((_pair_noise(self._scaled)[: self.rank - 1] / gaps).amax())

    def error(self, allowed: float = 0.0, *, weights: Tensor | None = None, left: bool = False) -> tuple[float, bool]:
        """Estimate the sine of the angle between a subspace and the exact one, from the backward error of an SVD.

        Pairs of directions on both sides of the cut count by their gap. Left directions also count by their singular
        value: directions beyond the singular ones have the value 0.

        Args:
            allowed: largest sine that the caller accepts. If an SVD in float64 would exceed it too, the closest pairs
                are left out: rounding, not the matrix, decides which of their directions lead. 0 leaves out none.
            weights: (k,) factors of the errors of the single directions; None means 1.
            left: whether the left subspace is meant.

        Returns:
            The sine (Frobenius norm over all directions), infinite for equal values, and whether the choice of
            directions is arbitrary: a pair was left out, or rounding decided their number.
        """
        if self.rank == 0:
            return BACKWARD_ERROR, False
        if self.edge and not allowed:
            return math.inf, False
        factors = torch.ones_like(self._least) if weights is None else weights
        sums = torch.hypot(self._mixing_sums, self._least / self._scaled[: self.rank]) if left else self._mixing_sums
        left_out = bool(allowed) and float(torch.linalg.vector_norm(factors * sums)) > allowed
        factors = factors * (1 + (self.spread - self.inherent) * self._scaled[0] / self._least)
        if left_out:
            pairs = factors[:, None] * self._mixing_of_pairs(left)
            smallest_first = pairs.flatten().sort().values.square().cumsum(0)
            kept = smallest_first[smallest_first <= allowed**2]
            rounding = float(kept[-1]) ** 0.5 if len(kept) else 0.0
        else:
            rounding = float(torch.linalg.vector_norm(factors * sums))
        largest = 1.0 if weights is None else float(weights.amax())
        return math.hypot(self.measured * largest, rounding) + BACKWARD_ERROR, left_out or self.edge

    @cached_property
    def _scaled(self) -> Tensor:
        """The values over a power of two near the largest one (n,); 1 if all are 0, and so equal."""
        largest = float(self.values[0])
        return self.values * 2.0 ** min(-math.frexp(largest)[1], 1000) if largest else torch.ones_like(self.values)

    @cached_property
    def _least(self) -> Tensor:
        """The least backward error of each kept direction (k,), in the scaled unit."""
        return _pair_noise(self._scaled)[: self.rank] + self.inherent * self._scaled[0]

    def _mixing_of_pairs(self, left: bool = False) -> Tensor:
        """Return that error over the gap of each pair across the cut (k, any number)."""
        lead, rest = self._scaled[: self.rank, None], self._scaled[None, self.rank :]
        gaps = torch.cat([lead - rest, lead], dim=1) if left else lead - rest
        return self._least[:, None] / gaps.clamp_(min=0)

    @cached_property
    def _mixing_sums(self) -> Tensor:
        """The same, for each kept direction the norm over all pairs (k,)."""
        norms: Tensor = torch.linalg.vector_norm(self._mixing_of_pairs(), dim=1)
        return norms


def _pair_noise(values: Tensor) -> Tensor:
    """Return by how much rounding mixes each direction with others, over the gap, in the unit of the values.

    Fitted to the differences of two SVDs by LAPACK (matrices of 2 to 300 rows and many spectra, 99.9 % of them):
    entries of the backward error are like rounding spread over all directions, and larger where singular values are.
    """
    relative = values / values[0]
    typical = values[0] * relative.square().mean() ** 0.25
    return EPS * typical * (2 + 24 * relative)


def root_errors(eigenvalues: Tensor, noise: float) -> Tensor:
    """Bound the errors of the square roots of eigenvalues whose own errors are `noise` times the largest.

    Args:
        eigenvalues: (n,) float64, not negative.
        noise: relative to the largest.
    """
    error = noise * eigenvalues.amax()
    roots = eigenvalues.sqrt()
    return torch.maximum((eigenvalues + error).sqrt() - roots, roots - (eigenvalues - error).clamp(min=0).sqrt())
