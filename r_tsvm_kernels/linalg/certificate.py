"""The accuracy of a spectral result, as measured by the call that returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError
from .decompositions import frobenius_norm
from .rounding import BACKWARD_ERROR

Mode = Literal["exact", "fast"]

# Errors are relative to the result. If tasks cancel each other to less than this share of their norm, errors are
# relative to this share.
CANCELLED = 2.0**-20

# Largest relative error (Frobenius norm) of a result, against the same computation in float64 by SVD.
TOLERANCES: dict[str, float] = {"exact": 1e-4, "fast": 1e-2}


@dataclass(frozen=True, repr=False)
class Certificate:
    """Measured accuracy of a spectral result; all numbers are dimensionless.

    Its `repr` is one line, such as ``Certificate(gram-float64, error 5e-07 ok)``.

    Attributes:
        error: estimated bound of the result's relative error (Frobenius norm). It adds up the error of the subspaces
            times the sensitivity of the polar factors, their `orthogonality`, and rounding. For a merge it is relative
            to the merged matrix, or to 1e-6 of the task matrices if they cancel each other to less.
        orthogonality: defect of the orthonormal factors, ``norm(Q^T Q z - z) / norm(z)`` on random vectors z (the part
            of z that a partial isometry keeps).
        subspace_error: estimated sine of the angle between computed and exact singular subspaces, the largest of the
            tasks.
        tolerance: limit of `error`: 1e-4 in ``exact`` mode, 1e-2 in ``fast`` mode.
        route: the solver that computed the result; the most exact one if tasks needed different ones.
        basis_rank: numerical ranks of the concatenated left and right bases. If one is below ``sum(ranks)``, tasks
            share directions, and the polar factor is a partial isometry.
        basis_condition: largest over smallest kept singular value of the two concatenated bases. A large one amplifies
            errors of the subspaces in the merged matrix. NaN if the route does not measure it.
        gap: relative gap ``(s_k - s_(k+1)) / s_k`` at the cut, the smallest of the tasks: 0 for equal singular values,
            1 if nothing is cut off. NaN if the route does not measure it.
        arbitrary: whether the result depends on a choice among singular values that float64 cannot tell apart, at the
            cut or at the threshold of the numerical rank. Any choice is right, another SVD may choose differently, and
            `error` holds for the choice that was made.
        escalations: cheaper routes that failed before `route`, each with the reason.
    """

    error: float
    orthogonality: float
    subspace_error: float
    tolerance: float
    route: str
    basis_rank: tuple[int, int] = (0, 0)
    basis_condition: tuple[float, float] = (1.0, 1.0)
    gap: float = 1.0
    arbitrary: bool = False
    escalations: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the estimated error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """The estimated error, and whether it is within the tolerance, in a few characters."""
        return f"error {self.error:.1g} {'ok' if self.met else f'above {self.tolerance:.0e}'}"

    def __repr__(self) -> str:
        return f"Certificate({self.route}, {self.verdict})"

    def transposed(self) -> Certificate:
        """Return the certificate of the transposed result."""
        return replace(self, basis_rank=self.basis_rank[::-1], basis_condition=self.basis_condition[::-1])

    def rounded(self, dtype: torch.dtype) -> Certificate:
        """Return the certificate of the result rounded to a dtype."""
        return replace(self, error=self.error + torch.finfo(dtype).eps)

    @classmethod
    def worst(cls, certificates: Sequence[Certificate]) -> Certificate:
        """Return the certificate of a result made of several parts: the largest error, and all remarks.

        Args:
            certificates: one or more.
        """
        largest = max(certificates, key=lambda certificate: (not certificate.met, certificate.error))
        return replace(
            largest,
            gap=min(certificate.gap for certificate in certificates),
            arbitrary=any(certificate.arbitrary for certificate in certificates),
            escalations=tuple(dict.fromkeys(reason for part in certificates for reason in part.escalations)),
        )

    @classmethod
    def of_sum(cls, certificates: Sequence[Certificate], norms: Sequence[float], total: Tensor) -> Certificate:
        """Return the certificate of a sum.

        Args:
            certificates: of the summands.
            norms: their Frobenius norms.
            total: the sum. If summands cancel each other, its error is relative to `CANCELLED` times their norms.
        """
        size = max(frobenius_norm(total), CANCELLED * sum(norms))
        error = sum(part.error * norm for part, norm in zip(certificates, norms, strict=True))
        return replace(cls.worst(certificates), error=error / size if size else BACKWARD_ERROR)

    def require(self) -> None:
        """Check that the tolerance is met.

        Raises:
            ConvergenceError: the estimated error is above it.
        """
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
