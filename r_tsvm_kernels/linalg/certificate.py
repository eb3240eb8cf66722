"""What every spectral call says about its own accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConvergenceError


@dataclass(frozen=True)
class Certificate:
    """Measured accuracy of a spectral result; all numbers are dimensionless.

    Attributes:
        orthogonality: largest entry of ``|Q^T Q - I|`` over every basis that was computed.
        residual: largest ``norm(D V - U H) / norm(D)`` over the tasks (Frobenius norm).
        tolerance: what both numbers had to stay below.
        route: the solver whose result this is.
        basis_rank: numerical ranks of the concatenated left and right bases. Below ``sum(ranks)`` tasks share
            directions, and the polar factor is a partial isometry.
        basis_condition: largest over smallest kept singular value of the two concatenated bases. The larger, the more
            an error of the subspaces is amplified in the merged matrix.
        escalations: routes that missed the tolerance before this one.
    """

    orthogonality: float
    residual: float
    tolerance: float
    route: str
    basis_rank: tuple[int, int] = (0, 0)
    basis_condition: tuple[float, float] = (1.0, 1.0)
    escalations: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether both measured numbers are within the tolerance (NaN is not)."""
        return self.orthogonality <= self.tolerance and self.residual <= self.tolerance

    def require(self) -> None:
        """Raise `ConvergenceError` unless the tolerance is met."""
        if not self.met:
            raise ConvergenceError(
                f"{self.route}: orthogonality {self.orthogonality:.1e} and residual {self.residual:.1e} "
                f"must be at most {self.tolerance:.1e}; please report the tensor's shape and spectrum"
            )
