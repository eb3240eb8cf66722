"""How a purification is steered by traces: shared by the op, its reference and products of ordinary tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of `Steering.values` and of `Steering.counts`.
TRACE, SQUARE, STATE, RANK, LINEAR, QUADRATIC = range(6)
SINCE, DONE = range(2)


@dataclass(frozen=True)
class Steering:
    """What the next step of a purification does to each matrix X of a batch.

    Attributes:
        values: (6, B) float: trace and squared norm of X; 1 if the step shrinks, 0 if it grows, -1 if the matrix is
            done; the wanted trace; the factors of X and of ``X X``.
        counts: (2, B) int32: squares since the tolerances were met, and those beyond `extra`: from 1 on X is only
            copied, from 2 on not even that.
        limits: (P, 2, B) float: pairs of tolerances, for ``|tr X - rank|`` and ``tr X - tr X X``.
        extra: squares after one of the pairs is met, at least 1.
    """

    values: Tensor
    counts: Tensor
    limits: Tensor
    extra: int

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of X and of ``X X``, (B,) each."""
        return self.values[LINEAR], self.values[QUADRATIC]

    @property
    def summary(self) -> Tensor:
        """The first three rows of `values`."""
        return self.values[: STATE + 1]

    @property
    def done(self) -> Tensor:
        """Squares of each matrix after it was done (B,)."""
        return self.counts[DONE]

    def of_unscaled(self, scale: Tensor) -> Steering:
        """Return the same for planes of X without their scale (B,)."""
        values = self.values.clone()
        values[LINEAR] *= scale
        values[QUADRATIC] *= scale.square()
        return replace(self, values=values)

    def following(self, trace: Tensor, square_norm: Tensor) -> Steering:
        """Return what is done after a step, with the trace and squared norm of its results."""
        copied = self.done >= 2
        trace = torch.where(copied, self.values[TRACE], trace)
        square_norm = torch.where(copied, self.values[SQUARE], square_norm)
        return steered(trace, square_norm, self.values[RANK], self.counts[SINCE], self.limits, self.extra)


def first_steering(
    trace: Tensor, square_norm: Tensor, rank: Tensor, tolerances: Sequence[tuple[Tensor, Tensor]], extra: int
) -> Steering:
    """Return what the first step of a purification does, see `Steering`.

    Args:
        trace: (B,) traces of the matrices.
        square_norm: (B,) their squared Frobenius norms.
        rank: (B,) wanted traces.
        tolerances: pairs of (B,) limits, for the distance of the trace from `rank` and for ``tr X - tr X X``.
        extra: squares after one of the pairs is met, at least 1.

    Examples:
        >>> one = torch.ones(1)
        >>> steering = first_steering(1.5 * one, 1.25 * one, one, [(0.1 * one, 0.1 * one)], 1)
        >>> steering.factors  # of X and of X X: the step shrinks
        (tensor([0.]), tensor([1.]))
    """
    limits = torch.stack([torch.stack(pair) for pair in tolerances]).to(trace.dtype)
    since = torch.zeros_like(rank, dtype=torch.int32)
    return steered(trace, square_norm, rank.to(trace.dtype), since, limits, extra)


def steered(trace: Tensor, square_norm: Tensor, rank: Tensor, since: Tensor, limits: Tensor, extra: int) -> Steering:
    """Decide about the next step of each matrix.

    ``X X`` or ``2 X - X X``, whichever brings the trace nearer to the rank. When the tolerances are met, the rank
    becomes the nearest whole number, because another one would move eigenvalues across the cut again.
    """
    impurity = trace - square_norm
    met = (((trace - rank).abs() < limits[:, 0]) & (impurity < limits[:, 1])).any(0)
    rank = torch.where(met & (since == 0), (trace + 0.5).floor(), rank)
    since = since + (met | (since > 0))
    done = (since - extra).clamp(min=0)
    shrink = ((trace - rank) * impurity > 0).to(trace.dtype)  # |square - rank| < |2 trace - square - rank|
    running = done == 0
    values = [
        trace,
        square_norm,
        torch.where(running, shrink, -1.0),
        rank,
        torch.where(running, 2 - 2 * shrink, 1.0),
        torch.where(running, 2 * shrink - 1, 0.0),
    ]
    return Steering(torch.stack(values), torch.stack([since, done]), limits, extra)
