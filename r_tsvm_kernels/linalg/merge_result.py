"""What a TSV-Merge returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..text import kind_of, listed
from .certificate import Certificate


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
