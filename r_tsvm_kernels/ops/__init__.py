"""Operations on task vectors and matrices: one folder each, the reference beside its kernels."""

from ._planes import Planes, SymmetricProduct
from .add_update import add_update
from .elect_and_sum import Election, Sparsifier, elect_and_sum
from .elect_and_sum.ranked import RankedSparsifier, della_probabilities
from .gemm3 import gemm3
from .magnitude_ranks import magnitude_ranks
from .magnitude_select import MagnitudeSelection, kept_count, magnitude_select
from .purify_step import Steering, first_steering, purify_step
from .random_mask import random_mask
from .ranked_mask import ranked_mask
from .reweight_prune import OutlierClipping, pruned_sparsity, reweight_prune
from .split_planes import split_planes
from .spread_mask import spread_mask
from .spread_select import spread_select
from .symm_gram import symm_gram
from .symm_square import symm_square
from .task_gram import task_gram
from .task_spread import task_spread
from .task_statistics import TaskStatistics, task_statistics

__all__ = [
    "Election",
    "MagnitudeSelection",
    "OutlierClipping",
    "Planes",
    "RankedSparsifier",
    "Sparsifier",
    "Steering",
    "SymmetricProduct",
    "TaskStatistics",
    "add_update",
    "della_probabilities",
    "elect_and_sum",
    "first_steering",
    "gemm3",
    "kept_count",
    "magnitude_ranks",
    "magnitude_select",
    "pruned_sparsity",
    "purify_step",
    "random_mask",
    "ranked_mask",
    "reweight_prune",
    "split_planes",
    "spread_mask",
    "spread_select",
    "symm_gram",
    "symm_square",
    "task_gram",
    "task_spread",
    "task_statistics",
]
