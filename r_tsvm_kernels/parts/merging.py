"""Merge one tensor from its parts: ``W = W_0 + alpha * sum_t w_t M_t``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConvergenceError, NonFiniteError
from ..linalg import Certificate, Factored
from ..linalg.certificate import tolerance_of
from ..methods import MergeResult, MethodParameters, TensorReport
from ..ops import add_update
from ..ops._checks import accumulation_dtype, is_finite
from ..parts_folder import TensorParts
from ..values import check_options, overflow, stored


def merge_parts(
    base: Tensor,
    parts: Sequence[Tensor | Factored],
    facts: TensorParts,
    options: MethodParameters,
    out_dtype: torch.dtype,
    *,
    method: str,
    name: str,
    dtype: torch.dtype | None = None,
) -> MergeResult:
    """Return ``W_0 + alpha * sum_t w_t M_t``.

    Args:
        base: W_0, or some of its rows.
        parts: M_t of each task, or the same rows of them; all factored, or none.
        facts: what ``parts.json`` says of the tensor.
        options: parameters of the method, of which `weight`, `alpha` and `mode` count.
        out_dtype: dtype of the result.
        method: name of the method, for the report.
        name: of the tensor.
        dtype: dtype that the base is rounded to first; None leaves it.

    Raises:
        NonFiniteError: the result does not fit its dtype.
        ConvergenceError: the parts are not accurate enough for these weights.
    """
    alpha, weights = getattr(options, "alpha", 1.0), options.weight
    base = base if dtype is None else stored(base, dtype, name)
    wide = accumulation_dtype(base, *(part.left if isinstance(part, Factored) else part for part in parts))
    check_options(options, wide, name)
    merged = add_update(base, weighted_sum_of_parts(parts, weights, wide), alpha)
    result = stored(merged, out_dtype, name)
    if not is_finite(result):
        raise NonFiniteError(overflow(merged, options, name))
    report = TensorReport(method, facts.treatment, facts.reason, facts.shape, ranks=list(facts.ranks))
    report.weights = list(weights)
    report.certificate = certified(facts, options, wide, name)
    return MergeResult(result, report)


def certified(facts: TensorParts, options: MethodParameters, dtype: torch.dtype, name: str) -> Certificate | None:
    """Return the certificate of a merge from parts, which is met; None if there was no decomposition.

    Args:
        facts: what ``parts.json`` says of the tensor.
        options: parameters of the method, of which `weight` and `mode` count.
        dtype: that the sum is formed in.
        name: of the tensor.

    Raises:
        ConvergenceError: it is not met; the message says whether weights or parts are the cause.
    """
    tolerance, fast = tolerance_of(getattr(options, "mode", "exact")), tolerance_of("fast")
    found = facts.certificate_of(options.weight, dtype, tolerance)
    if found is None or found.met:
        return found
    advice = f", or set mode: fast ({fast:.0e})" if found.error <= fast else ""
    alone = facts.error_of(options.weight, dtype)
    if alone > tolerance:
        raise ConvergenceError(
            f"{name}: the parts have an estimated error of {alone:.1e}, above {tolerance:.0e}, from their "
            "decomposition or the dtype that they are stored in; decompose again, with mode: exact and --store-dtype "
            f"float32{advice}"
        )
    raise ConvergenceError(
        f"{name}: with these weights the parts cancel each other, and the estimated error of what is left is "
        f"{found.error:.1e}, above {tolerance:.0e}; merge without parts{advice}"
    )


def weighted_sum_of_parts(parts: Sequence[Tensor | Factored], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return ``sum_t w_t M_t``, formed in `dtype`: factored parts as one product.

    Examples:
        >>> weighted_sum_of_parts([torch.ones(2), torch.ones(2)], [1.0, -0.25], torch.float32)
        tensor([0.7500, 0.7500])
    """
    factored = [part for part in parts if isinstance(part, Factored)]
    if len(factored) == len(parts):
        lefts = [part.left.to(dtype) * (weight * part.scale) for part, weight in zip(factored, weights, strict=True)]
        return torch.cat(lefts, dim=1) @ torch.cat([part.right.to(dtype) for part in factored])
    total: Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        dense = (part.dense() if isinstance(part, Factored) else part).to(dtype)
        total = dense * weight if total is None else total.add_(dense, alpha=weight)
    assert total is not None
    return total
