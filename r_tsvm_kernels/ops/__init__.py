"""Element-wise operations on task vectors: one folder each, the reference beside its kernels."""

from ._checks import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group
from .add_update import add_update
from .elect_and_sum import Election, Keep, elect_and_sum, normalized
from .magnitude_select import MagnitudeSelection, kept_count, magnitude_select
from .random_mask import random_mask
from .reweight_prune import OutlierWeighting, outlier_weights, pruned_sparsity, reweight_prune
from .task_statistics import TaskStatistics, task_statistics

__all__ = [
    "FLOAT_DTYPES",
    "Election",
    "Keep",
    "MagnitudeSelection",
    "OutlierWeighting",
    "TaskStatistics",
    "accumulation_dtype",
    "add_update",
    "check_finite",
    "check_group",
    "elect_and_sum",
    "kept_count",
    "magnitude_select",
    "normalized",
    "outlier_weights",
    "pruned_sparsity",
    "random_mask",
    "reweight_prune",
    "task_statistics",
]
