"""Check matrices, ranks and weights of callers, and bring them into the one form that the solvers work with."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DeviceError, DTypeError, NonFiniteError, ShapeError
from .decompositions import largest_magnitude
from .ranks import Rank

# Where no row or column is zero throughout, so many columns and rows mostly show it.
STRIP = 8


def given_matrices(matrices: Iterable[Tensor] | Tensor, op: str, *, one_device: bool = False) -> list[Tensor]:
    """Return the matrices, detached from the autograd graph.

    Raises:
        ShapeError: one is not a matrix.
        DTypeError: one is not a dense tensor of float32 or float64.
        DeviceError: they must be on one device and are not.
    """
    given = [dense(matrix, op) for matrix in matrices]
    for matrix in given:
        if matrix.ndim != 2:
            raise ShapeError(f"{op}: expected matrices, got shape {tuple(matrix.shape)}")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise DTypeError(f"{op}: expected float32 or float64, got {matrix.dtype}; convert it with .float()")
    devices = {matrix.device for matrix in given}
    if one_device and len(devices) > 1:
        raise DeviceError(f"{op}: matrices on {', '.join(sorted(map(str, devices)))}; move them with .to()")
    return given


def given_batch(matrices: Sequence[Tensor] | Tensor, op: str, *, one_device: bool = False) -> tuple[list[Tensor], bool]:
    """Return the matrices as `given_matrices`, and whether the argument is a single matrix.

    Args:
        matrices: a matrix (m, n), or several: a list of matrices or a tensor (batch, m, n).
        op: name of the function in messages.
        one_device: whether they must be on one device.

    Raises:
        ShapeError: an argument is not a matrix, or a tensor has another number of dimensions.
        DTypeError, DeviceError: as `given_matrices`.
    """
    if not isinstance(matrices, Tensor):
        return given_matrices(matrices, op, one_device=one_device), False
    if matrices.ndim not in (2, 3):
        raise ShapeError(f"{op}: expected a matrix (m, n) or a batch (b, m, n), got shape {tuple(matrices.shape)}")
    single = matrices.ndim == 2
    return given_matrices([matrices] if single else matrices, op, one_device=one_device), single


def nonzero_support(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rows and columns in which some matrix is not zero.

    Merges leave out all others, which must stay exactly zero.

    Args:
        matrices: T matrices (m, n).

    Returns:
        Two rising int64 tensors of indices.

    Examples:
        >>> rows, columns = nonzero_support([torch.tensor([[0.0, 1.0], [0.0, 0.0]])])
        >>> rows.tolist(), columns.tolist()
        ([0], [1])
    """
    first = matrices[0]
    if bool(torch.cat([(first[:, :STRIP] != 0).any(1), (first[:STRIP] != 0).any(0)]).all()):
        return torch.arange(len(first), device=first.device), torch.arange(first.shape[1], device=first.device)
    support = first != 0
    for matrix in matrices[1:]:
        support |= matrix != 0
    return support.any(1).nonzero()[:, 0], support.any(0).nonzero()[:, 0]


def dense(matrix: Any, op: str, *, meta: bool = False) -> Tensor:
    """Return a dense tensor, detached from the autograd graph.

    Args:
        matrix: a tensor of the caller.
        op: name of the function in messages.
        meta: whether a tensor without data is accepted.

    Raises:
        DTypeError: it is not a dense tensor.
    """
    if not isinstance(matrix, Tensor):
        raise DTypeError(f"{op}: expected torch tensors, got {type(matrix).__name__}; convert it with torch.as_tensor")
    if matrix.layout != torch.strided or (matrix.is_meta and not meta):
        kind = "a meta tensor" if matrix.is_meta else f"layout {matrix.layout}"
        raise DTypeError(f"{op}: expected dense tensors that hold data, got {kind}; convert it with .to_dense()")
    return matrix.detach()


def given_ranks(ranks: Any, count: int, op: str) -> list[Rank]:
    """Return `count` ranks, whole numbers or rank rules; a single one is repeated.

    Raises:
        ShapeError: another number of ranks, or a negative rank.
        ConfigError: a rank is neither a whole number nor a rule.
    """
    if callable(ranks) or _is_scalar(ranks):
        ranks = [ranks] * count
    if not isinstance(ranks, Iterable) or isinstance(ranks, str):
        raise ConfigError(f"{op}: expected one rank, or one for each matrix, got {ranks!r}")
    found = [rank if callable(rank) else whole_number(rank, f"{op}: a rank") for rank in ranks]
    if len(found) != count:
        raise ShapeError(f"{op}: {count} matrices, {len(found)} ranks")
    return found


def whole_number(value: Any, what: str) -> int:
    """Return a whole number >= 0 as an int.

    Raises:
        ConfigError: it is not a whole number.
        ShapeError: it is negative.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{what} must be a whole number, got {value!r}; round it with int()") from None
    if number < 0:
        raise ShapeError(f"{what} must not be negative, got {number}")
    return number


def given_weights(weights: Any, count: int, op: str) -> list[float]:
    """Return `count` weights from numbers, an array or a tensor; a single one is repeated, None means 1.

    Raises:
        ShapeError: another number of weights.
        ConfigError: a weight is not a finite number.
    """
    if weights is None:
        return [1.0] * count
    if _is_scalar(weights):
        weights = [weights] * count
    found = [finite_number(weight, f"{op}: a weight") for weight in weights]
    if len(found) != count:
        raise ShapeError(f"{op}: {count} matrices, {len(found)} weights")
    return found


def one_for_each_layer(values: Any, layers: int, op: str, name: str) -> Sequence[Any]:
    """Return `values`, of which each layer has its own; None means None for each.

    Raises:
        ShapeError: another number of them, or a single one.
    """
    if values is None:
        return [None] * layers
    try:
        found = str(len(values))
    except TypeError:  # a number, or a tensor without dimensions
        found = f"all ({values!r})"
    if found != str(layers):
        raise ShapeError(f"{op}: {layers} layers, {name} for {found}; give each layer its own")
    return list(values)


def finite_number(value: Any, what: str) -> float:
    """Return a finite number as a float.

    Raises:
        ConfigError: it is not a finite number.
    """
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what} must be a finite number, got {value!r}")
    return number


def finite(result: Tensor, op: str) -> Tensor:
    """Return a result of finite matrices.

    Raises:
        NonFiniteError: the result overflows its dtype.
    """
    if not math.isfinite(largest_magnitude(result)):
        raise NonFiniteError(
            f"{op}: the result overflows {result.dtype} (largest {torch.finfo(result.dtype).max:.1e}); "
            "check the scale of the matrices and weights"
        )
    return result


def _is_scalar(value: Any) -> bool:
    """Whether this is one number: of Python, of NumPy, or a 0-D tensor."""
    return not isinstance(value, Sequence) and getattr(value, "ndim", 0 if isinstance(value, int | float) else 1) == 0
