"""Spectral operations on task matrices; every result comes with a certificate of its accuracy."""

from .certificate import Certificate
from .polar import PolarFactor, polar_factor
from .ranks import RankRule, choose_rank, energy_rank, fixed_rank, noise_rank, sparsity_rank
from .subspaces import Subspaces, leading_subspaces
from .tsv_merge import TsvMerge, tsv_merge

__all__ = [
    "Certificate",
    "PolarFactor",
    "RankRule",
    "Subspaces",
    "TsvMerge",
    "choose_rank",
    "energy_rank",
    "fixed_rank",
    "leading_subspaces",
    "noise_rank",
    "polar_factor",
    "sparsity_rank",
    "tsv_merge",
]
