"""What every spectral call says about its own accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError, ConvergenceError

Mode = Literal["exact", "fast"]

# Largest relative error (Frobenius norm) of a result, against the same computation in float64 by SVD.
TOLERANCES: dict[str, float] = {"exact": 1e-4, "fast": 1e-2}


@dataclass(frozen=True)
class Certificate:
    """Measured accuracy of a spectral result; all numbers are dimensionless.

    Attributes:
        error: estimated bound of the result's relative error: ``subspace_error * max(basis_condition) +
            orthogonality``, and for a merge the rounding of its last product, in the dtype of the task matrices.
        orthogonality: defect of the orthonormal factors, ``norm(Q^T Q z - z) / norm(z)`` on random vectors z (the part
            of z that a partial isometry keeps).
        subspace_error: estimated sine of the angle between computed and exact singular subspaces, the largest of the
            tasks. Directions whose singular values are equal to rounding are not told apart, and need not be.
        tolerance: what `error` had to stay below: 1e-4 in ``exact`` mode, 1e-2 in ``fast`` mode.
        route: the solver whose result this is, the most exact one if the tasks took different ones.
        basis_rank: numerical ranks of the concatenated left and right bases. Below ``sum(ranks)`` tasks share
            directions, and the polar factor is a partial isometry.
        basis_condition: largest over smallest kept singular value of the two concatenated bases. The larger, the more
            an error of the subspaces is amplified in the merged matrix. NaN where the route does not measure it.
        escalations: routes that were tried before this one and given up, each with the reason.
    """

    error: float
    orthogonality: float
    subspace_error: float
    tolerance: float
    route: str
    basis_rank: tuple[int, int] = (0, 0)
    basis_condition: tuple[float, float] = (1.0, 1.0)
    escalations: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the estimated error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance

    def require(self) -> None:
        """Raise `ConvergenceError` unless the tolerance is met."""
        if not self.met:
            raise ConvergenceError(
                f"{self.route}: the estimated error {self.error:.1e} (orthogonality {self.orthogonality:.1e}, "
                f"subspaces {self.subspace_error:.1e}, basis condition {max(self.basis_condition):.1e}) must be "
                f"at most {self.tolerance:.0e}; please report the tensor's shape and spectrum"
            )


def tolerance_of(mode: str) -> float:
    """Return the tolerance of a mode.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in TOLERANCES:
        raise ConfigError(f"mode must be one of {', '.join(TOLERANCES)}, got {mode!r}")
    return TOLERANCES[mode]
