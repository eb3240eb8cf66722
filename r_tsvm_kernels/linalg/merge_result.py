"""What a TSV-Merge returns: the merged update, or its summands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..text import kind_of, listed
from .certificate import Certificate
from .factored import Factored


@dataclass(frozen=True, repr=False)
class TsvMerge:
    """The merged update and what was measured on the way.

    Attributes:
        matrix: (m, n) merged update in the dtype of the task matrices; float32 for 16-bit factors.
        ranks: rank used per task: the rank asked for, clipped to the numerical rank.
        captured_energy: per task, fraction of the squared Frobenius norm inside the subspaces that were kept.
        certificate: measured accuracy.
        interference: overlap of the tasks' left and of their right subspaces before they were made orthogonal, see
            `interference_of_gram`.
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate
    interference: tuple[float, float]

    def __repr__(self) -> str:
        return f"TsvMerge({kind_of(self.matrix)}, {listed(self.ranks)}, {self.certificate.verdict})"


@dataclass(frozen=True, repr=False)
class TsvParts:
    """The summands of a TSV-Merge, one for each task, and what was measured on the way.

    ``sum_t w_t M_t`` is the merge with the weights w_t: bases and polar factors do not depend on them.

    Attributes:
        parts: M_t of each task, (m, n) of rank ``ranks[t]``, in float64. Unless tasks share directions, those of
            different tasks are orthogonal to each other.
        ranks: as in `TsvMerge`.
        captured_energy: as in `TsvMerge`.
        certificate: of the merge with weights 1.
        interference: as in `TsvMerge`.
    """

    parts: tuple[Factored, ...]
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate
    interference: tuple[float, float]

    def __repr__(self) -> str:
        m, n = self.parts[0].shape
        return f"TsvParts({m}x{n}, {listed(self.ranks)}, {self.certificate.verdict})"
