"""mergekit's geometric methods with our kernels: the coefficients come from one Gram matrix in float64.

As in `kernels`, functions return None for inputs that mergekit should handle. The thresholds below are mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mergekit.merge_methods import PerInputValues, TensorBatch, TensorGroup
from torch import Tensor

from ...methods.gram import gram_matrix, row_grams
from ...methods.karcher import karcher_weights
from ...methods.model_stock import add_row_wise
from ...ops import elect_and_sum
from . import INSTALLATION
from .kernels import accepted, zeros_like

SMALLEST_PRODUCT = 1e-6  # of two norms, in a cosine
SMALLEST_DENOMINATOR = 1e-6  # Model Stock keeps the base below it
SMALLEST_TOTAL = 1e-6  # of two weights; NuSLERP takes the middle below it
SHORTEST = 1e-7  # a vector of NuSLERP that is not divided by its own norm
LINEAR_COSINE = 0.9995  # SLERP is linear above it


def model_stock(group: TensorGroup, filter_wise: bool = False) -> Tensor | None:
    """Interpolate between the base and the mean of the models."""
    tuned = [entry.tensor for entry in group.non_base]
    base: Tensor = group.base.tensor
    if len(tuned) < 2 or not accepted(base, *tuned):
        return None
    by_rows = filter_wise and base.ndim > 1
    INSTALLATION.count("gram_matrix")
    ratio = _interpolation_ratio(row_grams(tuned, base) if by_rows else gram_matrix(tuned, base))
    if not bool(ratio.isfinite().all()):
        return None
    weights = [1 / len(tuned)] * len(tuned)
    if by_rows:
        return add_row_wise(base, tuned, weights, ratio, base.dtype)
    return _combined(tuned, weights, base, float(ratio))


def _interpolation_ratio(gram: Tensor) -> Tensor:
    """Return mergekit's ratio, which unlike ours may be outside [0, 1]; NaN for values that are not finite."""
    tasks = gram.shape[-1]
    first, second = torch.triu_indices(tasks, tasks, offset=1, device=gram.device)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = (norms[..., first] * norms[..., second]).clamp(min=SMALLEST_PRODUCT)
    cosine = (gram[..., first, second] / lengths).clamp(-1, 1).mean(-1)
    denominator = 1 + (tasks - 1) * cosine
    return torch.where(denominator.abs() < SMALLEST_DENOMINATOR, 0, tasks * cosine / denominator)


def karcher(group: TensorGroup, max_iter: int = 10, tol: float = 1e-5) -> Tensor | None:
    """Return the mean on the sphere, times the mean norm."""
    tensors = group.tensors
    if len(tensors) < 2 or not accepted(*tensors):
        return None
    INSTALLATION.count("gram_matrix")
    gram = gram_matrix(tensors)
    if not bool(gram.isfinite().all()):
        return None
    w = gram.new_full((len(tensors),), 1 / len(tensors))
    return _combined(tensors, karcher_weights(gram, w, max_iter, tol, shortest=tol))


def multislerp(
    group: TensorGroup, weight: PerInputValues[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Tensor | None:
    """Return the weighted mean of the directions, with the mean of the lengths."""
    tensors = [entry.tensor for entry in group.non_base]
    base = group.base.tensor if group.base else None
    if len(tensors) < 2 or not accepted(*group.tensors):
        return None
    INSTALLATION.count("gram_matrix")
    gram = gram_matrix(tensors, base)
    w = torch.tensor(weight.values_for(group.non_base), dtype=gram.dtype, device="cpu")
    w = w / w.sum() if normalize_weights else w
    norms = gram.diagonal().sqrt()
    unit = w / norms
    length = float((unit @ gram @ unit).sqrt())
    # Leave it to mergekit near eps, where its guards matter, and where directions cancel. NaN fails the comparison too.
    if not (float(norms.min()) > 1e7 * eps and length > max(eps, 1e-7 * float(w.abs().sum()))):
        return None
    return _combined(tensors, (float(w @ norms) / length * unit).tolist(), base)


def nuslerp(
    group: TensorGroup, weight: PerInputValues[float], nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Tensor | None:
    """Interpolate along the great circle between two whole tensors or task vectors; mergekit itself handles rows."""
    base = group.base.tensor if group.base else None
    if not nuslerp_flatten or not accepted(*group.tensors):
        return None
    first, second = (entry.tensor for entry in group.non_base)
    weights = weight.values_for(group.non_base)
    t = 0.5 if abs(sum(weights)) < SMALLEST_TOTAL else weights[1] / sum(weights)
    INSTALLATION.count("gram_matrix")
    gram = gram_matrix([first, second], base)
    if not (bool(gram.isfinite().all()) and float(gram.diagonal().min().sqrt()) > SHORTEST):
        return None
    cosine = _cosine(gram)
    return _combined([first, second], _great_circle(t, cosine, 1 - cosine**2 <= 1e-16), base)


def slerp(batch: TensorBatch, t: Tensor) -> Tensor | None:
    """Interpolate along the great circle between two tensors, for each of the batch."""
    if batch.base_index is None or len(batch.tensors) != 2 or not accepted(*batch.tensors):
        return None
    base, tuned = batch.tensors[batch.base_index], batch.tensors[1 - batch.base_index]
    merged = []
    for first, second, position in zip(base, tuned, t.flatten().tolist(), strict=True):
        INSTALLATION.count("gram_matrix")
        gram = gram_matrix([first, second])
        if not bool(gram.isfinite().all()):
            return None
        cosine = _cosine(gram, shortest=1e-8)
        merged.append(_combined([first, second], _great_circle(position, cosine, abs(cosine) > LINEAR_COSINE)))
    return torch.stack(merged) if len(merged) > 1 else merged[0].unsqueeze(0)


def _cosine(gram: Tensor, shortest: float = 0.0) -> float:
    """Return the cosine between two tensors, in which too short ones are not divided by their norms."""
    norms = gram.diagonal().sqrt()
    product = float(torch.where(norms > shortest, norms, 1).prod())
    return max(-1.0, min(1.0, float(gram[0, 1]) / product))


def _great_circle(t: float, cosine: float, linear: bool) -> tuple[float, float]:
    if linear:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _combined(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Return the weighted sum of the tensors, or of their differences from the base."""
    origin = zeros_like(tensors[0]) if base is None else base
    INSTALLATION.count("elect_and_sum")
    return elect_and_sum(origin, tensors, weights, alpha=alpha).to(origin.dtype)
