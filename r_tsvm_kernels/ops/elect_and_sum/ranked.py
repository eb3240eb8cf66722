"""Survival by rank: one probability for each rank of a magnitude within its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError, DTypeError, ShapeError
from .._checks import check_plain


@dataclass(frozen=True)
class RankedSparsifier:
    """Which elements survive by chance, with a probability that depends on their rank within the row.

    DELLA (Deep et al., arXiv 2406.11617, MAGPRUNE): ``ranks = magnitude_ranks(tuned, base=base)``,
    ``keep_probabilities = della_probabilities(cols, density, epsilon)``.

    Attributes:
        ranks: int32, of the tensor's shape, from 0 to cols - 1: from `magnitude_ranks`.
        keep_probabilities: of surviving, by rank; float64 of shape (cols,) on the CPU, each in [0, 1].
        rescale: divide the survivors by their probability, so that the mean over all draws is the element itself.
    """

    ranks: Tensor
    keep_probabilities: Tensor
    rescale: bool = True

    def __post_init__(self) -> None:
        ranks, probabilities = self.ranks, self.keep_probabilities
        check_plain(ranks, "RankedSparsifier: ranks")
        check_plain(probabilities, "RankedSparsifier: keep_probabilities")
        if ranks.dtype != torch.int32 or probabilities.dtype != torch.float64:
            raise DTypeError(
                "RankedSparsifier: expected int32 ranks and float64 keep_probabilities, "
                f"got {ranks.dtype} and {probabilities.dtype}"
            )
        if probabilities.ndim != 1 or ranks.ndim == 0 or ranks.shape[-1] != len(probabilities):
            raise ShapeError(
                "RankedSparsifier: expected one probability per column, got "
                f"{tuple(probabilities.shape)} for ranks of shape {tuple(ranks.shape)}"
            )
        check_probabilities(probabilities, "RankedSparsifier")
        if ranks.numel() > 0:  # kernels look them up in tables
            low, high = (int(rank) for rank in torch.aminmax(ranks))
            if low < 0 or high >= len(probabilities):
                raise ConfigError(
                    f"RankedSparsifier: ranks must be in [0, {len(probabilities) - 1}], got {low} to {high}"
                )


class RankTables(NamedTuple):
    """Tables that kernels look up by rank.

    Attributes:
        thresholds: int64 of shape (cols,): an element survives iff its random word is below; 2**32 for always.
        factors: float64 of shape (cols,): survivors are multiplied by them; 0 for a rank without survivors.
    """

    thresholds: Tensor
    factors: Tensor


def rank_tables(ranked: RankedSparsifier, factor: float) -> RankTables:
    """Return the tables of a sparsifier, on the CPU; `factor` is weight times rescale of the task."""
    thresholds = rank_thresholds(ranked.keep_probabilities)
    factors = torch.full_like(ranked.keep_probabilities, factor)
    if ranked.rescale:
        factors /= ranked.keep_probabilities
    return RankTables(thresholds, torch.where(thresholds > 0, factors, 0))


def rank_thresholds(keep_probabilities: Tensor) -> Tensor:
    """Return the numbers below which the 32-bit words of survivors are, by rank; int64, 2**32 for always."""
    return (keep_probabilities * 2.0**32).round().long()  # as mask_threshold: half to even


def check_probabilities(keep_probabilities: Tensor, label: str) -> None:
    """Raise `ConfigError` unless they are on the CPU and in [0, 1]."""
    if keep_probabilities.device.type != "cpu":
        raise ConfigError(f"{label}: keep_probabilities are on {keep_probabilities.device}; move them with .cpu()")
    if not bool(((keep_probabilities >= 0) & (keep_probabilities <= 1)).all()):  # NaN fails both comparisons
        raise ConfigError(f"{label}: keep_probabilities must be in [0, 1]")


def della_probabilities(cols: int, density: float, epsilon: float) -> Tensor:
    """Return the probabilities of MAGPRUNE, linear in the rank: ``density - epsilon`` to ``density + epsilon``.

    ``density - epsilon + 2 * epsilon * rank / (cols - 1)``; `density` itself for one column (Deep et al.,
    arXiv 2406.11617). Float64, shape (cols,), on the CPU.

    Raises:
        ConfigError: epsilon < 0, density - epsilon < 0, density + epsilon > 1, or cols < 0.
    """
    if not (epsilon >= 0 and density - epsilon >= 0 and density + epsilon <= 1):
        raise ConfigError(
            "della_probabilities: expected epsilon >= 0, density - epsilon >= 0 and density + epsilon <= 1, "
            f"got density {density}, epsilon {epsilon}"
        )
    if cols < 0:
        raise ConfigError(f"della_probabilities: expected cols >= 0, got {cols}")
    if cols == 1:
        return torch.tensor([density], dtype=torch.float64, device="cpu")
    ranks = torch.arange(cols, dtype=torch.float64, device="cpu")
    return (density - epsilon + 2 * epsilon * ranks / (cols - 1)).clamp(0, 1)
