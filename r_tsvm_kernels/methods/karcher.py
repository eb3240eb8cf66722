"""Karcher mean: the point of the sphere with the least sum of squared distances to all models along great circles.

With the directions ``u_t = W_t / norm(W_t)`` of the models and weights of sum 1::

    W = sum_t(w_t norm(W_t)) * argmin_u sum_t(w_t arccos(<u, u_t>)^2),   norm(u) = 1

Source: Wang et al., arXiv 2603.04972. The iterates are combinations of the models: all steps are on T numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum
from ..ops.elect_and_sum import normalized
from .base import FiniteFloat, MethodParameters, register
from .gram import cosines, geometric_cost, gram_matrix
from .reports import MergeResult, TensorReport

# Cosines up to this one are -1 up to rounding.
OPPOSITE = -1 + 1e-12


class KarcherParameters(MethodParameters):
    """Parameters of `karcher`."""

    max_iter: int = Field(default=10, ge=0, description="most iterations")
    tol: FiniteFloat = Field(default=1e-5, gt=0, description="length of a step, in radians, at which iterations end")

    def check_weights(self) -> None:
        """Refuse weights that sum to 0.

        Raises:
            ConfigError: they do.
        """
        normalized(self.weight, "choose others")


def karcher_coefficients(directions: Tensor, w: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the c for which ``sum(c_t u_t)`` is the Karcher mean of unit vectors, from their products (T, T)."""

    def length(c: Tensor) -> Tensor:
        return (c @ directions @ c).clamp(min=0).sqrt()

    c = w.clone()
    if length(c) < tol:  # they cancel: start from the first model with a weight
        c = torch.zeros_like(w)
        c[int(w.nonzero()[0])] = 1
    c /= length(c)
    for _ in range(max_iter):
        cosine = (directions @ c).clamp(-1, 1)
        angle = cosine.acos()
        # At the opposite point all directions are equally short, so it has no pull.
        pull = w * torch.where(cosine < 1, angle / angle.sin(), 1) * (cosine > OPPOSITE)
        step = pull - (pull @ cosine) * c
        size = length(step)
        if size < tol:
            break
        c = size.cos() * c + size.sin() / size * step
        c /= length(c)
    return c


@register(
    "karcher",
    pretty_name="Karcher mean",
    paper_url="https://arxiv.org/abs/2603.04972",
    parameters=KarcherParameters,
    rounds=True,
    ops=("elect_and_sum", "task_gram"),
    needs_base=False,
    cost=geometric_cost,
)
def karcher(
    base: Tensor, tuned: Sequence[Tensor], options: KarcherParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by the Karcher mean: the formula at the top of this module.

    Tensors of zeros have no direction; they count in the mean of the norms.

    Examples:
        >>> tuned = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
        >>> karcher(torch.zeros(2), tuned, KarcherParameters(weight=[1.0, 1.0])).weight
        tensor([0.7071, 0.7071])
    """
    w = torch.tensor(normalized(options.weight, "choose others"), dtype=torch.float64, device="cpu")
    weights = karcher_weights(gram_matrix(tuned), w, options.max_iter, options.tol)
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)
    return MergeResult(elect_and_sum(zeros, tuned, weights, out_dtype=out_dtype), TensorReport(weights=weights))


def karcher_weights(gram: Tensor, w: Tensor, max_iter: int, tol: float, shortest: float = 0.0) -> list[float]:
    """Return the weights of the models in their Karcher mean.

    Args:
        gram: products of the models (T, T) float64.
        w: their weights, of sum 1.
        max_iter: most iterations.
        tol: length of a step at which they end.
        shortest: a model of this norm or a smaller one has no direction.
    """
    norms, directions = gram.diagonal().sqrt(), cosines(gram)
    long = (norms > shortest) & (w != 0)
    if not bool(long.any()):
        return [0.0] * len(w)
    there = torch.where(long, w, 0)
    c = karcher_coefficients(directions, there / there.sum(), max_iter, tol)
    weights: list[float] = torch.where(long, (w @ norms) * c / norms, 0).tolist()
    return weights
