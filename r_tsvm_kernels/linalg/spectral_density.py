"""Where the eigenvalues of a Gram matrix lie, roughly, from a few Lanczos steps: stochastic Lanczos quadrature.

Each random vector gives a rule whose nodes and weights stand for the eigenvalues and their numbers (Ubaru, Chen and
Saad, SIAM J. Matrix Anal. Appl. 38, 2017). Near 0, where the eigenvalues of a Gram matrix crowd, the nodes are closest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decompositions import eigh
from .on_device import gaussian

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
    n = len(gram)
    steps, mean = min(STEPS, n), float(gram.diagonal().double().mean())
    vectors = min(VECTORS, n)
    basis = gram.new_zeros(vectors, n, steps + 1)
    basis[:, :, 0] = torch.linalg.qr(gaussian(n, vectors, gram.device)).Q.mT
    diagonal, beside = list[Tensor](), list[Tensor]()
    for step in range(steps):
        own = basis[:, :, : step + 1]
        last = own[:, :, -1:]
        W = (gram @ last[:, :, 0].mT).mT[:, :, None]
        diagonal.append((W * last).sum((1, 2)))
        for _ in range(2):  # once is not enough in float32
            W = W - own @ (own.mT @ W)
        norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
        if step + 1 in (FIRST, steps):
            nodes, weights = _rules(diagonal, beside)
            if step + 1 == FIRST and float(nodes[:, -1].max()) < flat * mean:
                return None
        beside.append(norms[:, 0, 0])
        basis[:, :, step + 1 :][:, :, :1] = W / norms.clamp(min=torch.finfo(W.dtype).tiny)
    largest = float(nodes[:, -1].max())
    found = [[_value(own, share * n, place) for own, share in zip(nodes, weights, strict=True)] for place in places]
    return [sum(values) / len(values) / largest for values in found]


def _rules(diagonal: Sequence[Tensor], beside: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return nodes, rising, and weights of each vector (vectors, steps), from the entries of the Lanczos matrices."""
    matrices = torch.diag_embed(torch.stack(list(diagonal), 1).double().cpu())
    if beside:
        next_to = torch.stack(list(beside), 1).double().cpu()
        matrices = matrices + torch.diag_embed(next_to, 1) + torch.diag_embed(next_to, -1)
    rules = [eigh(matrix) for matrix in matrices]
    return torch.stack([values for values, _ in rules]), torch.stack([vectors[0].square() for _, vectors in rules])


def _value(nodes: Tensor, counts: Tensor, place: float) -> float:
    """Return the eigenvalue with `place` larger ones, linear between the middles of the nodes."""
    nodes, counts = nodes.flip(0).clamp(min=0), counts.flip(0)
    middles = counts.cumsum(0) - counts / 2
    after = int(torch.searchsorted(middles, middles.new_tensor(float(place))))
    if after == 0:
        return float(nodes[0])
    if after == len(nodes):
        rest = len(nodes) and float(counts.sum() - middles[-1])
        return float(nodes[-1]) * max(0.0, float(counts.sum()) - place) / max(rest, 1e-300)
    share = (place - float(middles[after - 1])) / max(float(middles[after] - middles[after - 1]), 1e-300)
    return float(nodes[after - 1] + share * (nodes[after] - nodes[after - 1]))
