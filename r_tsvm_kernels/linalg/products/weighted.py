"""Weighted orthogonalisation with q = 1 from matrix products alone, with the measurements for a certificate.

The notation, and the two treatments of the long side, are those of `weighted_eigen`. With ``A_t = D_t / n_t``, ``Q_t``
the blocks of the polar factor of the stacked ``[A_1; .. A_T]``, ``N_t = A_t^T Q_t``, and V_k the leading right singular
vectors of a task::

    whole side:  M_t = n_t P_t N_t,  with P_t the blocks of polar([A_1 .. A_T])
    hybrid:      M_t = n_t (P_t H_t + A_t W_t),  with P_t the blocks of polar([A_1 V_k .. A_T V_k]),
                 H_t = V_k^T N_t  and  W_t = (I - V_k V_k^T) N_t R^(-1/2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..certificate import CANCELLED, Certificate, Mode, tolerance_of
from ..weighted_eigen import WeightedSum
from ..weighted_tasks import Scales
from .gram_polar import gram_polar
from .number_formats import Arithmetic, Precision, arithmetic
from .polar_accuracy import MeasuredPolar
from .subspaces import ProductsSubspaces, accurate_subspaces
from .weighted_accuracy import Accuracy, Hybrid, accuracy_of_whole


@dataclass(frozen=True)
class ProductsWeighted:
    """The merged update of a layer with its measurements.

    Attributes:
        matrix: (m, n) float64.
        retained: T numbers, see `weighted_merge`.
        accuracy: of the matrix.
        parts: each M_t, if asked for.
    """

    matrix: Tensor
    retained: tuple[float, ...]
    accuracy: Accuracy
    parts: tuple[Tensor, ...] = ()


def weighted_sums_by_products(
    layers: Tensor, weights: Sequence[Sequence[float]], lead: int | None, mode: Mode, *, keep_parts: bool = False
) -> list[tuple[Tensor, tuple[Tensor, ...], WeightedSum]]:
    """Merge layers in one batch; return the merged matrices, each M_t if asked for, and what was measured.

    The caller checks the certificates.

    Args:
        layers: (L, T, m, n), see `products_weighted_merges`; the longer side may be either.
        weights: T factors for each layer.
        lead: as for `products_weighted_merges`.
        mode: ``exact`` or ``fast``.
        keep_parts: return each M_t.

    Raises:
        NonFiniteError: weights times norms overflow.
    """
    T, flipped = layers.shape[1], layers.shape[-2] < layers.shape[-1]
    long, short = max(layers.shape[-2:]), min(layers.shape[-2:])
    tolerance = None if mode == "exact" else tolerance_of(mode) / 2
    results = []
    tall = layers.mT if flipped else layers
    for merge in products_weighted_merges(tall, weights, lead, tolerance=tolerance, keep_parts=keep_parts):
        accuracy = merge.accuracy
        certificate = Certificate(
            error=accuracy.error,
            orthogonality=accuracy.orthogonality,
            subspace_error=accuracy.subspace_error,
            tolerance=tolerance_of(mode),
            route="products-fp16x3",
            basis_rank=(long if lead is None else T * lead, short),
            basis_condition=accuracy.condition,
            gap=accuracy.gap,
        ).rounded(layers.dtype)
        found = WeightedSum(
            (short if lead is None else lead,) * T,
            merge.retained,
            certificate.transposed() if flipped else certificate,
        )
        matrix, *parts = (x.mT if flipped else x for x in (merge.matrix, *merge.parts))
        results.append((matrix.to(layers.dtype), tuple(parts), found))
    return results


def products_weighted_merges(
    layers: Tensor,
    weights: Sequence[Sequence[float]],
    lead: int | None,
    precision: Precision = "fp16x3",
    tolerance: float | None = None,
    *,
    keep_parts: bool = False,
) -> list[ProductsWeighted]:
    """Merge the task matrices of several layers in one batch, see `weighted_merge`; q = 1, ranks are not limited.

    Args:
        layers: (L, T, m, n) float32 or float64, m >= n, finite, no matrix of zeros.
        weights: T factors for each layer.
        lead: number of leading directions that are orthogonalised on both sides; None for the whole long side.
        precision: format of the products.
        tolerance: of the leading directions, see `accurate_subspaces`.
        keep_parts: return each M_t.

    Raises:
        NonFiniteError: weights times norms overflow.
    """
    numbers = arithmetic(precision)
    L, T, m, n = layers.shape
    # In units of a power of two near the largest entry, so that no square overflows.
    exponents = torch.frexp(layers.abs().amax((-2, -1)).double().clamp(min=2.0**-1000)).exponent
    A = torch.ldexp(layers.double(), -exponents[..., None, None])
    norms = torch.linalg.vector_norm(A, dim=(-2, -1))
    A /= norms[..., None, None]
    scales = [
        Scales.of(own, factors) for own, factors in zip(torch.ldexp(norms, exponents).tolist(), weights, strict=True)
    ]
    stacked = A.reshape(L, T * m, n)
    right = gram_polar(stacked, precision)
    N = multiply(A.mT, right.matrix.view(L, T, m, n), numbers)
    rights = MeasuredPolar.of_batch(stacked, right, numbers)
    if lead is None:
        flipped = A.mT.reshape(L, T * n, m)
        lefts = MeasuredPolar.of_batch(flipped, gram_polar(flipped, precision), numbers)
        return [_whole(*layer, numbers, keep_parts) for layer in zip(A, N, lefts, rights, scales, strict=True)]
    parts = accurate_subspaces(A.flatten(0, 1), [lead] * (L * T), precision, tolerance)
    images = torch.stack([part.U @ part.core for part in parts]).view(L, T, m, lead)
    Y = images.transpose(1, 2).reshape(L, m, T * lead)
    lefts = MeasuredPolar.of_batch(Y, gram_polar(Y, precision), numbers)
    of_layers = [parts[first : first + T] for first in range(0, L * T, T)]
    return [_hybrid(A[i], N[i], of_layers[i], lefts[i], rights[i], scales[i], numbers, keep_parts) for i in range(L)]


def multiply(x: Tensor, y: Tensor, numbers: Arithmetic) -> Tensor:
    """Return ``x y``, multiplied in the format of `numbers`."""
    return numbers.dense(numbers.multiply(numbers.load(x), numbers.load(y)))


def _whole(
    A: Tensor,
    N: Tensor,
    left: MeasuredPolar,
    right: MeasuredPolar,
    scales: Scales,
    numbers: Arithmetic,
    keep_parts: bool,
) -> ProductsWeighted:
    """Orthogonalise both sides of a layer as a whole.

    Args:
        A: (T, m, n) float64.
        N: (T, n, n).
        left: of the transposed matrices side by side, (T n, m).
        right: of the stacked matrices, (T m, n).
        scales: of the M_t.
        numbers: format of the products.
        keep_parts: whether to return each M_t.
    """

    def merge(factors: Tensor) -> Tensor:
        return multiply(left.Q.mT, (factors * N).flatten(0, 1), numbers)

    merged, retained, size = _sums(merge, A, scales)
    accuracy = accuracy_of_whole(A, left, right, scales, merged, size, numbers.eps)
    return ProductsWeighted(merged * scales.unit, retained, accuracy, _parts(merge, A, scales) if keep_parts else ())


def _hybrid(
    A: Tensor,
    N: Tensor,
    parts: Sequence[ProductsSubspaces],
    left: MeasuredPolar,
    right: MeasuredPolar,
    scales: Scales,
    numbers: Arithmetic,
    keep_parts: bool,
) -> ProductsWeighted:
    """Orthogonalise the leading directions of a layer on both sides, the others on the short side alone.

    Args:
        A: (T, m, n) float64.
        N: (T, n, n).
        parts: the leading directions of each task.
        left: of their images side by side, (m, T k).
        right: of the stacked matrices, (T m, n).
        scales: of the M_t.
        numbers: format of the products.
        keep_parts: whether to return each M_t.
    """
    V = torch.stack([part.Vh.mT for part in parts])
    heads = multiply(V.mT, N, numbers)
    tails = (
        multiply(N - multiply(V, heads, numbers), right.root.to(N.dtype).expand_as(N), numbers).double() * right.gain
    )
    # What rounding left in the leading directions would count most.
    tails -= V @ (V.mT @ tails)

    def merge(factors: Tensor) -> Tensor:
        led = multiply(left.Q, (factors * heads).flatten(0, 1), numbers)
        return led.double() + multiply(A.transpose(0, 1).flatten(1), (factors * tails).flatten(0, 1), numbers)

    merged, retained, size = _sums(merge, A, scales)
    hybrid = Hybrid(A, N.double(), V, heads.double(), tails, left, right, scales)
    own = _parts(merge, A, scales) if keep_parts else ()
    return ProductsWeighted(merged * scales.unit, retained, hybrid.accuracy(parts, size, numbers.eps), own)


def _parts(merge: Callable[[Tensor], Tensor], A: Tensor, scales: Scales) -> tuple[Tensor, ...]:
    """Return each M_t; the arguments are those of `_sums`."""
    ones = (A.new_tensor(scales.one(index))[:, None, None] for index in range(len(A)))
    return tuple(merge(factors).double() * scales.unit for factors in ones)


def _sums(merge: Callable[[Tensor], Tensor], A: Tensor, scales: Scales) -> tuple[Tensor, tuple[float, ...], float]:
    """Return the weighted sum of the ``M_t / n_t``, what is retained of each task, and what errors are relative to.

    Args:
        merge: returns the sum with the factors (T, 1, 1).
        A: (T, m, n) float64.
        scales: of the M_t.
    """
    sums = [merge(A.new_tensor(factors)[:, None, None]).double() for factors in scales.sums]
    # Where all factors are zero, so are all errors.
    size = max(float(torch.linalg.vector_norm(sums[0])), CANCELLED * scales.total) or 1.0
    return sums[0], scales.retained((A * sums[-1]).sum((-2, -1)).tolist()), size
