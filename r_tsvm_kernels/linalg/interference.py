"""How much the subspaces of the tasks overlap before TSV-Merge makes them orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor


def interference_of_gram(gram: Tensor, ranks: Sequence[int]) -> float:
    """Return the root mean square cosine of the principal angles between the subspaces of different tasks.

    With the Gram matrix ``G = X^T X`` of the concatenated orthonormal bases ``X = [X_1 .. X_T]``, X_t of k_t columns::

        norm(G - I) / sqrt(sum over s != t of min(k_s, k_t))        (Frobenius)

    The singular values of the block ``X_s^T X_t`` are the cosines of the min(k_s, k_t) principal angles (Bjorck and
    Golub, 1973), and the diagonal blocks of G are identities. The number is 0 if the subspaces are orthogonal, when
    TSV-Merge changes nothing, and 1 if of every two subspaces one contains the other. Random k-dimensional subspaces of
    R^n have about ``sqrt(k / n)``: see `interference_above_chance`.

    Args:
        gram: (k, k) with ``k = sum(ranks)``; only the part above the diagonal blocks is read.
        ranks: columns of each task's basis.

    Returns:
        A number in [0, 1]; 0 if fewer than two tasks have a rank.

    Examples:
        >>> interference_of_gram(torch.eye(4), [2, 2])
        0.0
    """
    ends = [sum(ranks[: index + 1]) for index in range(len(ranks))]
    blocks = [gram[end - rank : end, end:] for end, rank in zip(ends, ranks, strict=True)]
    return _share(sum(float(block.square().sum()) for block in blocks if block.numel()), ranks)


def interference_of_bases(bases: Sequence[Tensor]) -> float:
    """Return the number of `interference_of_gram` from the bases, computed in float32.

    Args:
        bases: T matrices (n, k_t) with orthonormal columns.

    Examples:
        >>> interference_of_bases([torch.eye(4)[:, :2], torch.eye(4)[:, 1:3]])  # one of two directions is shared
        0.707...
    """
    narrow = [basis.float() for basis in bases]
    overlap = sum(float((a.mT @ b).square().sum()) for a, b in combinations(narrow, 2) if a.numel() and b.numel())
    return _share(overlap, [basis.shape[1] for basis in bases])


def interference_above_chance(interference: float, ranks: Sequence[int], size: int) -> float | None:
    """Rescale the mean square cosine so that independent subspaces have 0 and equal ones 1.

    For independent random subspaces of R^n of dimensions k and l, the mean of ``norm(X^T Y)^2`` is ``k l / n``, and the
    mean square cosine of their principal angles is ``max(k, l) / n``. With ``chance``, the mean of the latter over all
    angles of all pairs of tasks::

        (interference^2 - chance) / (1 - chance)

    Args:
        interference: of `interference_of_gram` or `interference_of_bases`.
        ranks: dimensions of the tasks' subspaces.
        size: n, the dimension of the space.

    Returns:
        1 if the subspaces are equal or contain each other; about 0 if they are independent; negative if they overlap
        less than that, ``-chance / (1 - chance)`` if they are orthogonal. None if there is nothing to compare: fewer
        than two tasks have a rank, or one subspace of each pair is the whole space.

    Examples:
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
