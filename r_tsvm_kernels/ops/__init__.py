"""Operations on task vectors and matrices: one folder each, the reference beside its kernels."""

from ._checks import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group
from ._planes import Planes, SymmetricProduct
from .add_update import add_update
from .elect_and_sum import Election, Keep, elect_and_sum, normalized
from .gemm3 import gemm3
from .magnitude_select import MagnitudeSelection, kept_count, magnitude_select
from .random_mask import random_mask
from .reweight_prune import OutlierWeighting, outlier_weights, pruned_sparsity, reweight_prune
from .split_planes import split_planes
from .symm_gram import symm_gram
from .symm_square import symm_square
from .task_statistics import TaskStatistics, task_statistics

__all__ = [
    "FLOAT_DTYPES",
    "Election",
    "Keep",
    "MagnitudeSelection",
    "OutlierWeighting",
    "Planes",
    "SymmetricProduct",
    "TaskStatistics",
    "accumulation_dtype",
    "add_update",
    "check_finite",
    "check_group",
    "elect_and_sum",
    "gemm3",
    "kept_count",
    "magnitude_select",
    "normalized",
    "outlier_weights",
    "pruned_sparsity",
    "random_mask",
    "reweight_prune",
    "split_planes",
    "symm_gram",
    "symm_square",
    "task_statistics",
]
