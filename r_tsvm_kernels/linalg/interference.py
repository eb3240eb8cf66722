"""How much the subspaces of the tasks overlap before they are made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor


def interference_of_gram(gram: Tensor, ranks: Sequence[int]) -> float:
    """Return the root mean square cosine of the principal angles between the subspaces of different tasks.

    With the Gram matrix ``G = X^T X`` of the concatenated orthonormal bases ``X = [X_1 .. X_T]``, X_t of k_t columns::

        norm(G - I) / sqrt(sum over s != t of min(k_s, k_t))        (Frobenius)

    for the singular values of the block ``X_s^T X_t`` are the cosines of the min(k_s, k_t) principal angles (Bjorck and
    Golub, 1973), and the diagonal blocks of G are identities. 0: the tasks' subspaces are orthogonal, and TSV-Merge
    has nothing to do. 1: each contains, or lies in, every other one. Random k-dimensional subspaces of an n-dimensional
    space have about ``sqrt(k / n)``: see `interference_above_chance`.

    Args:
        gram: (k, k) with ``k = sum(ranks)``; only what lies above its diagonal blocks is read.
        ranks: columns of each task's basis.

    Returns:
        A number in [0, 1]; 0 where fewer than two tasks have a rank.
    """
    ends = [sum(ranks[: index + 1]) for index in range(len(ranks))]
    blocks = [gram[end - rank : end, end:] for end, rank in zip(ends, ranks, strict=True)]
    return _share(sum(float(block.square().sum()) for block in blocks if block.numel()), ranks)


def interference_of_bases(bases: Sequence[Tensor]) -> float:
    """Return the same number from the bases, each (n, k_t) with orthonormal columns; in float32."""
    narrow = [basis.float() for basis in bases]
    overlap = sum(float((a.mT @ b).square().sum()) for a, b in combinations(narrow, 2) if a.numel() and b.numel())
    return _share(overlap, [basis.shape[1] for basis in bases])


def interference_above_chance(interference: float, ranks: Sequence[int], size: int) -> float | None:
    """Return how far the mean square cosine is from that of independent subspaces to that of equal ones.

    Of independent random subspaces of R^n, of dimensions k and l, ``norm(X^T Y)^2`` is ``k l / n`` on average, and the
    mean square cosine of their principal angles ``max(k, l) / n``. With ``chance`` the mean of the latter over all
    angles of all pairs of tasks::

        (interference^2 - chance) / (1 - chance)

    Args:
        interference: of `interference_of_gram` or `interference_of_bases`.
        ranks: dimensions of the tasks' subspaces.
        size: n, the dimension of the space.

    Returns:
        1 where the subspaces are the same, or lie in each other; about 0 where they are independent; negative where
        they overlap less than that, ``-chance / (1 - chance)`` where they are orthogonal. None where there is nothing
        to compare: fewer than two tasks have a rank, or of each pair one fills the whole space.

    Example:
        >>> interference_above_chance(0.5, [16, 16], 64)  # sqrt(16 / 64)
        0.0
    """
    pairs = [pair for pair in combinations(ranks, 2) if min(pair) > 0]
    angles = sum(min(pair) for pair in pairs)
    chance = sum(a * b for a, b in pairs) / (size * angles) if angles else 1.0
    return (interference**2 - chance) / (1 - chance) if chance < 1 else None


def _share(overlap: float, ranks: Sequence[int]) -> float:
    most = sum(min(pair) for pair in combinations(ranks, 2))
    return float(min(1.0, (overlap / most) ** 0.5)) if most else 0.0
