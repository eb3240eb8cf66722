"""Element-wise operations on task vectors: one folder each, the reference beside its kernels."""

from ._checks import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group
from .add_update import add_update
from .magnitude_select import MagnitudeSelection, kept_count, magnitude_select
from .reweight_prune import OutlierWeighting, outlier_weights, reweight_prune
from .task_statistics import TaskStatistics, task_statistics

__all__ = [
    "FLOAT_DTYPES",
    "MagnitudeSelection",
    "OutlierWeighting",
    "TaskStatistics",
    "accumulation_dtype",
    "add_update",
    "check_finite",
    "check_group",
    "kept_count",
    "magnitude_select",
    "outlier_weights",
    "reweight_prune",
    "task_statistics",
]
