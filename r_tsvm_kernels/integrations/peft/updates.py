"""Combine the updates of one module as PEFT's ``add_weighted_adapter`` does, and cut the result to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...linalg import Factored, leading_triplets, subspace_iteration, truncated_svd, weighted_sum
from ...ops import Sparsifier, elect_and_sum, magnitude_select

MajoritySign = Literal["total", "frequency"]


class Rule(NamedTuple):
    """The steps of a combination type before the SVD."""

    prune: Literal["none", "magnitude", "random"]
    elect: bool


# PEFT's types that end in an SVD.
RULES: dict[str, Rule] = {
    "svd": Rule("none", elect=False),
    "magnitude_prune_svd": Rule("magnitude", elect=False),
    "ties_svd": Rule("magnitude", elect=True),
    "dare_linear_svd": Rule("random", elect=False),
    "dare_ties_svd": Rule("random", elect=True),
}
_ELECTIONS: dict[str, Literal["sum", "count"]] = {"total": "sum", "frequency": "count"}
# Number of elements that an election in torch processes at a time.
_TILE = 1 << 20


def combined_triplets(
    matrices: Sequence[Factored],
    weights: Sequence[float],
    combination_type: str,
    rank: int,
    *,
    density: float = 1.0,
    majority_sign_method: MajoritySign = "total",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of the combined updates: U (m, k), values (k,), Vh (k, n), float64.

    A weighted sum stays factored: two thin QRs and the SVD of a core. After pruning or an election the result is not a
    product of thin matrices. It is then formed in float32 (float64 if a factor is), with T + 1 matrices in memory.

    Args:
        matrices: T updates (m, n).
        weights: T finite numbers.
        combination_type: a key of `RULES`.
        rank: upper limit of k; the numerical rank is another.
        density: fraction of the elements that pruning keeps, >= 0, for random pruning > 0; from 1 on nothing is pruned.
        majority_sign_method: how the sign is elected, before weights apply: ``total`` (sum) or ``frequency`` (count).
        seed: of the random masks.

    Raises:
        ConvergenceError: a decomposition failed.
        NonFiniteError: an update overflows.
    """
    rule = RULES[combination_type]
    limit = min(rank, *matrices[0].shape)
    if not rule.elect and (rule.prune == "none" or density >= 1):
        found = leading_triplets(weighted_sum(matrices, weights), limit)
        return found.U, found.S, found.Vh
    merged = _pruned_and_summed(
        [matrix.dense() for matrix in matrices], weights, rule, density, majority_sign_method, seed
    )
    # After pruning, the directions of the updates are still stronger than the noise that pruning adds.
    few = subspace_iteration(merged, limit, max(limit, sum(matrix.left.shape[1] for matrix in matrices)))
    if few is not None:
        return few
    # The fast mode's tolerance is that of a float32 SVD; see `extract_lora`.
    U, S, Vh = truncated_svd(merged, limit, mode="fast")
    return U, S, Vh


def _pruned_and_summed(
    updates: Sequence[Tensor], weights: Sequence[float], rule: Rule, density: float, majority: MajoritySign, seed: int
) -> Tensor:
    sparsifiers = [_sparsifier(update, rule, density, seed, task) for task, update in enumerate(updates)]
    zeros = updates[0].new_zeros(updates[0].shape[-1:]).expand_as(updates[0])  # expanded from one row
    if not rule.elect:
        return elect_and_sum(zeros, updates, weights, sparsifiers=sparsifiers)
    if len(set(weights)) == 1:
        ones = [1.0] * len(updates)
        return elect_and_sum(
            zeros, updates, ones, elect=_ELECTIONS[majority], normalize=True, alpha=weights[0], sparsifiers=sparsifiers
        )
    pairs = zip(updates, sparsifiers, strict=True)
    pruned = [elect_and_sum(zeros, [update], [1.0], sparsifiers=[own]) for update, own in pairs]
    return _disjoint_mean(pruned, weights, majority)


def _sparsifier(update: Tensor, rule: Rule, density: float, seed: int, task: int) -> Sparsifier:
    if density >= 1:
        return Sparsifier()
    if rule.prune == "magnitude":
        return Sparsifier(largest=magnitude_select(update, int(density * update.numel())))
    return Sparsifier(keep_probability=density, rescale=1 / density, seed=seed, substream=task)


def _disjoint_mean(updates: Sequence[Tensor], weights: Sequence[float], majority: MajoritySign) -> Tensor:
    """Average the updates that have the elected sign, as PEFT does: weights apply to the sum, not to votes or divisor.

    `elect_and_sum` weights all three; with equal weights the result is the same.
    """
    merged = torch.empty_like(updates[0])
    rows = max(1, _TILE // max(1, merged.shape[1]))
    factors = merged.new_tensor(list(weights))[:, None, None]
    for first in range(0, len(merged), rows):
        parts = torch.stack([update[first : first + rows] for update in updates])
        votes = (parts if majority == "total" else parts.sign()).sum(0)
        agree = parts.sign() == torch.where(votes >= 0, 1.0, -1.0)
        merged[first : first + rows] = (factors * parts * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged
