"""Leading right singular vectors by the cheapest route that is accurate enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .arguments import whole_number
from .decompositions import svd
from .eigenspaces import ForeseenError, gram_float32, gram_float64
from .ranks import Rank
from .rounding import BACKWARD_ERROR, Cut
from .tall_matrix import TallMatrix
from .two_stage import two_stage_runs

# From cheap to exact. If a result misses its tolerance, the next route computes it again.
ROUTES = ("gram-float32", "gram-float64", "svd-float64")
EXACT = ROUTES[2:]

# Up to TINY columns the cost of an SVD is negligible; from SMALL columns on float32 saves time.
TINY, SMALL = 64, 512

# Largest estimated error of a subspace. The conditioning of the concatenated bases, up to some thousands, amplifies it
# in the merged matrix.
SUBSPACE_TOLERANCE = {"exact": 2e-8, "fast": 2e-5}


@dataclass(frozen=True)
class RightVectors:
    """Leading right singular vectors of a tall matrix.

    Attributes:
        V: (n, k) float64, orthonormal, ordered by falling singular value; k is at most the numerical rank.
        cut: the singular values, in the units of the matrix, and how well the subspace is known.
        value_errors: (n,) bounds of the errors of the singular values.
        route: the solver that found them.
        escalations: cheaper routes that failed, with the reason.
    """

    V: Tensor
    cut: Cut
    value_errors: Tensor
    route: str
    escalations: tuple[str, ...] = ()


def rank_tolerance(matrix: TallMatrix) -> float:
    """Return the singular value below which a direction counts as zero, in the scaled units.

    ``eps * norm(D)`` (Frobenius) with eps of the matrix's dtype: rounding every element to that dtype moves no
    singular value by more than half of it (Weyl). For float64 the backward error of the SVD is larger, and is used
    instead.
    """
    eps = max(torch.finfo(matrix.matrix.dtype).eps, 2.0**-46)
    return float(eps * matrix.squared_norm**0.5)


def right_vectors(matrix: TallMatrix, rank: Rank, mode: str, routes: Sequence[str] | None = None) -> RightVectors:
    """Find the leading right singular vectors of a matrix by the first route that is accurate enough.

    The rank is clipped to the numerical rank (`rank_tolerance`): beyond it singular vectors are arbitrary, and
    arbitrary directions would reach rows and columns that the fine-tune never touched.

    Args:
        matrix: (m, n), m >= n.
        rank: number of vectors, or a rank rule.
        mode: ``exact`` or ``fast``.
        routes: solvers to try; None takes `first_routes`.

    Raises:
        ConvergenceError: every route failed.
    """
    n = matrix.shape[1]
    if routes is None:
        routes = first_routes(matrix.matrix, rank)
    if matrix.squared_norm == 0 or rank == 0:
        empty = matrix.matrix.new_zeros(n, 0, dtype=torch.float64)
        zeros = empty.new_zeros(n)
        return RightVectors(empty, Cut(zeros, 0), zeros, routes[0])
    escalations: list[str] = []
    for route in routes:
        try:
            found = _solve(matrix, rank, mode, route)
        except ForeseenError:  # nothing was lost
            continue
        except ConvergenceError as failure:
            escalations.append(str(failure))
            continue
        finally:
            matrix.forget()
        return replace(found, escalations=tuple(escalations))
    raise ConvergenceError("; ".join(escalations))


def first_routes(matrix: Tensor, rank: Rank) -> Sequence[str]:
    """Return the routes to try for a tall matrix.

    On small ones float32 saves no time, and small singular values are inaccurate. With the native module, the leading
    eigenvectors alone in float64 are found sooner than all in float32.
    """
    n = matrix.shape[1]
    if n <= TINY:
        return EXACT
    return ROUTES if n >= SMALL and isinstance(rank, int) and not two_stage_runs(matrix.device) else ROUTES[1:]


def _solve(matrix: TallMatrix, rank: Rank, mode: str, route: str) -> RightVectors:
    """Find the vectors by one route."""
    tolerance, smallest = SUBSPACE_TOLERANCE[mode], rank_tolerance(matrix)

    def clipped(values: Tensor) -> int:
        wanted = rank if isinstance(rank, int) else whole_number(rank(values), "what a rank rule returns")
        return min(wanted, int((values > smallest).sum()))

    def choose(values: Tensor, errors: Tensor) -> int | None:
        """Return the rank if it is the same for all values within their errors, else None."""
        others = {clipped((values - errors).clamp(min=0)), clipped(values + errors)}
        k = clipped(values)
        return k if others == {k} else None

    if route == "svd-float64":
        _, values, Vh = svd(matrix.triangular_factor())
        values = torch.cat([values, values.new_zeros(matrix.shape[1] - len(values))])
        errors = (BACKWARD_ERROR * values[0]).expand_as(values)
        k = clipped(values)
        cut = Cut(values / matrix.scale, k, edge=choose(values, errors) is None)
        return RightVectors(Vh[:k].mT, cut, errors / matrix.scale, route)
    if route == "gram-float64":
        found = gram_float64(matrix, choose, tolerance)
    elif isinstance(rank, int):
        found = gram_float32(matrix, min(rank, matrix.shape[1]), tolerance)
    else:
        raise ConvergenceError("gram-float32: the rank rule needs all singular values")
    cut = Cut(found.values / matrix.scale, found.V.shape[1], found.error, found.spread)
    (error, _), (least, _) = cut.error(), replace(cut, measured=0.0, spread=0.0).error()
    if error > max(tolerance, 2 * least):
        raise ConvergenceError(f"{route}: estimated error {error:.0e} of the subspace, allowed {tolerance:.0e}")
    return RightVectors(found.V, cut, found.errors / matrix.scale, route)
