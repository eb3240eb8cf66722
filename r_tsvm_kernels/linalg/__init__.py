"""Spectral operations on task matrices; every result comes with a certificate of its accuracy."""

from .arguments import nonzero_support
from .certificate import Certificate, Mode
from .factored import Factored, FactoredMerge, Triplets, factored_gram, leading_triplets, merge_factored, weighted_sum
from .interference import interference_above_chance, interference_of_bases, interference_of_gram
from .joint_spaces import CoreSpace, JointSvd, core_space, joint_svd
from .largest_singular_value import spectral_norm
from .memory import tsv_merge_bytes, tsv_merge_flops, weighted_merge_bytes, weighted_merge_flops
from .merge_result import TsvMerge, TsvParts
from .merging import Solver, tsv_merge, tsv_merge_layers, tsv_parts
from .orthogonal_iteration import subspace_iteration
from .polar_factor import PolarFactor, polar
from .products.cuda_graph import use_cuda_graphs
from .ranks import (
    LimitedRule,
    Rank,
    RankRule,
    asked_rank,
    choose_rank,
    energy_rank,
    fixed_rank,
    limited,
    noise_rank,
    rank_limit,
    shared_ranks,
    sparsity_power_rank,
    sparsity_rank,
)
from .rounding import BACKWARD_ERROR, Cut
from .subspaces import Subspaces, TruncatedSVD, leading_subspaces, truncated_svd
from .weighted_merging import (
    WeightedMerge,
    WeightedParts,
    long_side_is_whole,
    weighted_merge,
    weighted_merge_layers,
    weighted_parts,
)

__all__ = [
    "BACKWARD_ERROR",
    "Certificate",
    "CoreSpace",
    "Cut",
    "Factored",
    "FactoredMerge",
    "JointSvd",
    "LimitedRule",
    "Mode",
    "PolarFactor",
    "Rank",
    "RankRule",
    "Solver",
    "Subspaces",
    "Triplets",
    "TruncatedSVD",
    "TsvMerge",
    "TsvParts",
    "WeightedMerge",
    "WeightedParts",
    "asked_rank",
    "choose_rank",
    "core_space",
    "energy_rank",
    "factored_gram",
    "fixed_rank",
    "interference_above_chance",
    "interference_of_bases",
    "interference_of_gram",
    "joint_svd",
    "leading_subspaces",
    "leading_triplets",
    "limited",
    "long_side_is_whole",
    "merge_factored",
    "noise_rank",
    "nonzero_support",
    "polar",
    "rank_limit",
    "shared_ranks",
    "sparsity_power_rank",
    "sparsity_rank",
    "spectral_norm",
    "subspace_iteration",
    "truncated_svd",
    "tsv_merge",
    "tsv_merge_bytes",
    "tsv_merge_flops",
    "tsv_merge_layers",
    "tsv_parts",
    "use_cuda_graphs",
    "weighted_merge",
    "weighted_merge_bytes",
    "weighted_merge_flops",
    "weighted_merge_layers",
    "weighted_parts",
    "weighted_sum",
]
