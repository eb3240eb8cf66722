"""Leading right singular vectors by the cheapest route that is exact enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .decompositions import svd
from .eigenspaces import gram_float32, gram_float64
from .ranks import Rank
from .tall_matrix import TallMatrix

# From cheap to exact. A result that misses its tolerance is computed again by the next.
ROUTES = ("gram-float32", "gram-float64", "svd-float64")

SMALL = 256

# Estimated error of a subspace up to which a route's result is taken. The conditioning of the concatenated bases, up to
# some thousands, amplifies it in the merged matrix.
SUBSPACE_TOLERANCE = {"exact": 1e-8, "fast": 1e-5}


@dataclass(frozen=True)
class RightVectors:
    """Leading right singular vectors of a tall matrix.

    Attributes:
        V: (n, k) float64, orthonormal, ordered by falling singular value; k is at most the numerical rank.
        singular_values: (n,) all of them, falling, in the units of the matrix; small ones are inexact unless the route
            is ``svd-float64``.
        error: estimated sine of the angle to the exact subspace; 0 for ``svd-float64``, the definition of exact.
        route: which solver found them.
        escalations: routes given up before, with the reason.
    """

    V: Tensor
    singular_values: Tensor
    error: float
    route: str
    escalations: tuple[str, ...] = ()


def rank_tolerance(matrix: TallMatrix) -> float:
    """Return the singular value below which a direction counts as zero, in the scaled units.

    ``eps * norm(D)`` (Frobenius) with eps of the matrix's dtype: rounding every element to that dtype moves no
    singular value by more than half of it (Weyl). For float64 the SVD's own backward error is larger and decides.
    """
    eps = max(torch.finfo(matrix.matrix.dtype).eps, 2.0**-46)
    return float(eps * matrix.squared_norm**0.5)


def right_vectors(matrix: TallMatrix, rank: Rank, mode: str, routes: Sequence[str] | None = None) -> RightVectors:
    """Find the leading right singular vectors of `matrix`, by the first of `routes` that is exact enough.

    The rank is clipped to the numerical rank (`rank_tolerance`): beyond it singular vectors are arbitrary, and
    arbitrary directions would reach rows and columns that the fine-tune never touched.

    Without `routes`, those that are worth trying.

    Raises:
        ConvergenceError: every route failed.
    """
    n = matrix.shape[1]
    if routes is None:
        routes = first_routes(n, rank)
    if matrix.squared_norm == 0 or rank == 0:
        empty = matrix.matrix.new_zeros(n, 0, dtype=torch.float64)
        return RightVectors(empty, empty.new_zeros(n), 0.0, routes[0])
    failures: list[str] = []
    for route in routes:
        try:
            V, values, error = _solve(matrix, rank, mode, route)
        except ConvergenceError as failure:
            failures.append(str(failure))
            continue
        finally:
            matrix.forget()
        return RightVectors(V, values / matrix.scale, error, route, tuple(failures))
    raise ConvergenceError("; ".join(failures))


def first_routes(n: int, rank: Rank) -> Sequence[str]:
    """Return the routes worth trying: float32 gains nothing on small matrices, and knows too few singular values."""
    return ROUTES if n >= SMALL and isinstance(rank, int) else ROUTES[1:]


def _solve(matrix: TallMatrix, rank: Rank, mode: str, route: str) -> tuple[Tensor, Tensor, float]:
    """Return vectors, singular values in scaled units, and the estimated error."""
    n = matrix.shape[1]
    tolerance = SUBSPACE_TOLERANCE[mode]

    def clipped(values: Tensor) -> int:
        wanted = rank if isinstance(rank, int) else rank(values)
        return min(wanted, int((values > rank_tolerance(matrix)).sum()))

    if route == "gram-float32":
        if not isinstance(rank, int):
            raise ConvergenceError("gram-float32: the rank rule needs all singular values")
        found = gram_float32(matrix, min(rank, n), tolerance)
    elif route == "gram-float64":
        found = gram_float64(matrix, lambda eigenvalues: clipped(eigenvalues.sqrt()))
        if not found.error <= tolerance:
            raise ConvergenceError(f"gram-float64: estimated error {found.error:.0e} of the subspace")
    else:
        _, values, Vh = svd(matrix.triangular_factor())
        k = clipped(values)
        return Vh[:k].mT, torch.cat([values, values.new_zeros(n - len(values))]), 0.0
    return found.V, found.values.sqrt(), found.error
