"""Spectral operations on task matrices; every result comes with a certificate of its accuracy."""

from .certificate import Certificate, Mode
from .factored import Factored, FactoredMerge, leading_triplets, merge_factored
from .few_triplets import few_triplets
from .memory import tsv_merge_bytes, tsv_merge_flops
from .polar import PolarFactor, polar
from .ranks import Rank, RankRule, choose_rank, energy_rank, fixed_rank, noise_rank, sparsity_rank
from .subspaces import Subspaces, TruncatedSVD, leading_subspaces, truncated_svd
from .tsv_merge import Solver, TsvMerge, tsv_merge, tsv_merge_layers

__all__ = [
    "Certificate",
    "Factored",
    "FactoredMerge",
    "Mode",
    "PolarFactor",
    "Rank",
    "RankRule",
    "Solver",
    "Subspaces",
    "TruncatedSVD",
    "TsvMerge",
    "choose_rank",
    "energy_rank",
    "few_triplets",
    "fixed_rank",
    "leading_subspaces",
    "leading_triplets",
    "merge_factored",
    "noise_rank",
    "polar",
    "sparsity_rank",
    "truncated_svd",
    "tsv_merge",
    "tsv_merge_bytes",
    "tsv_merge_flops",
    "tsv_merge_layers",
]
