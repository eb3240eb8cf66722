"""Where the eigenvalues of a Gram matrix lie, roughly, from a few Lanczos steps: stochastic Lanczos quadrature.

Each random vector gives a rule whose nodes and weights stand for the eigenvalues and their numbers (Ubaru, Chen and
Saad, SIAM J. Matrix Anal. Appl. 38, 2017). Near 0, where the eigenvalues of a Gram matrix crowd, the nodes are closest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .on_device import gaussian

Array = npt.NDArray[np.float64]

STEPS, VECTORS = 40, 4
# After so many steps the largest eigenvalue is known well enough to see that a spectrum is nearly flat.
FIRST = 8


def eigenvalues_at(gram: Tensor, places: Sequence[int], flat: float = 0.0) -> list[float] | None:
    """Estimate the eigenvalues at some places of the falling order, as shares of the largest.

    Takes 40 products with 4 vectors.

    Args:
        gram: (n, n) float32 or float64, symmetric positive semidefinite, not zero.
        places: numbers of larger eigenvalues, in 0..n.
        flat: None is returned, after 8 products, if the largest eigenvalue is less than so many times their mean.
    """
    rules = lanczos_rules(gram[None], flat)
    return None if rules is None else rules[0].shares(places)


@dataclass(frozen=True)
class Rules:
    """Quadrature rules that stand for the eigenvalues of a matrix.

    Attributes:
        nodes: (vectors, steps) rising.
        counts: (vectors, steps) the number of eigenvalues that each node stands for.
    """

    nodes: Array
    counts: Array

    @property
    def largest(self) -> float:
        """The largest eigenvalue, from below."""
        return float(self.nodes[:, -1].max())

    def shares(self, places: Sequence[int]) -> list[float]:
        """Return the eigenvalues with so many larger ones, over the largest; zeros for a matrix of zeros."""
        if self.largest <= 0:
            return [0.0] * len(places)
        found = [[_value(*rule, place) for rule in zip(self.nodes, self.counts, strict=True)] for place in places]
        return [sum(values) / len(values) / self.largest for values in found]


def lanczos_rules(
    grams: Tensor, flat: float = 0.0, run: Callable[..., Tensor] = lambda steps, *args: steps(*args)
) -> list[Rules] | None:
    """Return the rules of positive semidefinite matrices (B, n, n); None if all are flat, see `eigenvalues_at`.

    Waits for the device once; twice if `flat` is given.

    Args:
        grams: the matrices.
        flat: see `eigenvalues_at`.
        run: calls a function that only launches.
    """
    batch, n = len(grams), grams.shape[-1]
    steps, vectors = min(STEPS, n), min(VECTORS, n)
    basis = grams.new_zeros(batch * vectors, n, steps + 1)
    basis[..., 0] = torch.linalg.qr(gaussian(n, vectors, grams.device)).Q.mT.repeat(batch, 1)
    taken = min(FIRST, steps) if flat else 0
    known = [run(lanczos_steps, grams, basis, 0, taken)] if flat else []
    if flat:
        rules = _rules(known[0], n)
        means = grams.diagonal(dim1=-2, dim2=-1).double().mean(-1).tolist()
        if all(own.largest < flat * mean for own, mean in zip(rules, means, strict=True)):
            return None
    if taken < steps:
        known.append(run(lanczos_steps, grams, basis, taken, steps))
    return _rules(torch.cat(known), n)


def lanczos_steps(grams: Tensor, basis: Tensor, first: int, last: int) -> Tensor:
    """Take some Lanczos steps; return the diagonals and the numbers beside them (steps, 2, B, vectors).

    Args:
        grams: (B, n, n).
        basis: (B vectors, n, all steps + 1), of which each step fills a column.
        first: number of the first step.
        last: number after that of the last one.
    """
    batch, n = len(grams), grams.shape[-1]
    tiny = torch.finfo(basis.dtype).tiny
    numbers = []
    for step in range(first, last):
        own = basis[..., : step + 1]
        W = (own[..., -1].view(batch, -1, n) @ grams).view(-1, n, 1)
        parts = own.mT @ W
        diagonal = parts[:, -1]
        W = torch.baddbmm(W, own, parts, alpha=-1)
        W = torch.baddbmm(W, own, own.mT @ W, alpha=-1)  # once is not enough in float32
        norms = torch.linalg.vector_norm(W, dim=-2, keepdim=True)
        numbers += [diagonal.view(batch, -1), norms.view(batch, -1)]
        torch.div(W, norms.clamp(min=tiny), out=basis[..., step + 1 : step + 2])
    return torch.stack(numbers).view(last - first, 2, batch, -1)


def _rules(numbers: Tensor, n: int) -> list[Rules]:
    """Return the rules of each matrix from the entries of its Lanczos matrices, see `lanczos_steps`."""
    own, next_to = np.array(numbers.tolist()).swapaxes(0, 1)  # (steps, B, vectors)
    rules = []
    for matrix in range(own.shape[1]):
        lanczos = [
            np.diag(own[:, matrix, vector])
            + np.diag(next_to[:-1, matrix, vector], 1)
            + np.diag(next_to[:-1, matrix, vector], -1)
            for vector in range(own.shape[2])
        ]
        values, vectors = np.linalg.eigh(np.stack(lanczos))
        rules.append(Rules(values, n * vectors[:, 0] ** 2))
    return rules


def _value(nodes: Array, counts: Array, place: float) -> float:
    """Return the eigenvalue with `place` larger ones, linear between the middles of the nodes."""
    nodes, counts = np.maximum(nodes[::-1], 0), counts[::-1]
    middles = np.cumsum(counts) - counts / 2
    # The eigenvalues beyond the last middle fall to 0.
    return float(np.interp(place, [*middles, counts.sum()], [*nodes, 0.0]))
