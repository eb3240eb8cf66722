"""How parts are stored: as factors of a fixed number of columns, or dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import TensorSpec
from ..linalg import Factored, factored_gram, leading_triplets
from ..linalg.decompositions import frobenius_norm
from ..methods.gram import gram_matrix
from ..parts_folder import LEFT, RIGHT, Kind
from ..values import stored


@dataclass(frozen=True)
class StoredParts:
    """How the parts of one tensor are stored.

    Attributes:
        tasks: names of the tasks.
        dtype: of the values.
        ranks: number of columns of the factors of each task; None if the parts are dense. Empty if there are no parts.
    """

    tasks: tuple[str, ...]
    dtype: torch.dtype
    ranks: tuple[int, ...] | None

    @property
    def kind(self) -> Kind:
        """``factors``, ``dense``, or ``base`` if there are no parts."""
        if self.ranks is None:
            return "dense"
        return "factors" if self.ranks else "base"

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return dtype and shape of what is stored for a tensor, by ``TASK/NAME``."""
        if self.ranks is None:
            return {f"{task}/{name}": TensorSpec(self.dtype, shape) for task in self.tasks}
        found = {}
        for task, rank in zip(self.tasks, self.ranks, strict=bool(self.ranks)):
            found[f"{task}/{name}{LEFT}"] = TensorSpec(self.dtype, (shape[0], rank))
            found[f"{task}/{name}{RIGHT}"] = TensorSpec(self.dtype, (rank, shape[1]))
        return found


@dataclass(frozen=True)
class WrittenParts:
    """Parts as they are written.

    Attributes:
        tensors: by ``TASK/NAME``, on the CPU.
        products: ``<M_s, M_t>`` of all parts, (T, T).
        rounding: norm of what rounding to the stored dtype changed, of each task.
    """

    tensors: dict[str, Tensor]
    products: list[list[float]]
    rounding: list[float]


def store_parts(parts: Sequence[Tensor | Factored], layout: StoredParts, name: str) -> WrittenParts:
    """Round the parts of a tensor, or of some of its rows, to their stored form.

    Factors are those of the singular value decomposition, ``U sqrt(S)`` and ``sqrt(S) V^T``, so that the leading
    columns are the best approximation of any lower rank. They are filled with zeros.

    Args:
        parts: T parts of one shape.
        layout: how they are stored.
        name: of the tensor.

    Raises:
        NonFiniteError: a value does not fit the dtype.
    """
    if not parts:
        return WrittenParts({}, [], [])
    factored = [part for part in parts if isinstance(part, Factored)]
    if layout.ranks is None:
        dense = [part.dense() if isinstance(part, Factored) else part for part in parts]
        return _dense(dense, layout, name)
    tensors, rounding = {}, []
    for task, part, rank in zip(layout.tasks, factored, layout.ranks, strict=True):
        left, right = (factor.cpu() for factor in _balanced(part, rank))
        rounded = [stored(factor, layout.dtype, f"{name} of {task}") for factor in (left, right)]
        tensors[f"{task}/{name}{LEFT}"], tensors[f"{task}/{name}{RIGHT}"] = (x.contiguous() for x in rounded)
        rounding.append(_difference(left, right, *(x.double() for x in rounded)))
    return WrittenParts(tensors, factored_gram(factored).tolist(), rounding)


def _dense(parts: Sequence[Tensor], layout: StoredParts, name: str) -> WrittenParts:
    tensors, rounding = {}, []
    for task, part in zip(layout.tasks, parts, strict=True):
        values = stored(part, layout.dtype, f"{name} of {task}").cpu().contiguous()
        tensors[f"{task}/{name}"] = values
        rounding.append(frobenius_norm(values.to(part) - part) if values.dtype != part.dtype else 0.0)
    return WrittenParts(tensors, gram_matrix([part.flatten() for part in parts]).tolist(), rounding)


def _balanced(part: Factored, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``U sqrt(S)`` (m, rank) and ``sqrt(S) V^T`` (rank, n) in float64, filled with zeros."""
    (m, n), width = part.shape, part.left.shape[1]
    left, right = part.left.new_zeros(m, rank, dtype=torch.float64), part.left.new_zeros(rank, n, dtype=torch.float64)
    if width:
        found = leading_triplets(part, rank)
        roots, count = found.S.sqrt(), len(found.S)
        left[:, :count], right[:count] = found.U * roots, roots[:, None] * found.Vh
    return left, right


def _difference(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> float:
    """Bound the norm of the difference of two products of factors."""

    def product(a: Tensor, b: Tensor) -> float:
        return math.sqrt(max(0.0, float(((a.mT @ a) * (b @ b.mT)).sum())))

    return product(new_left - left, new_right) + product(left, new_right - right)
