"""Merge methods, one short file each. Importing this package registers them."""

from . import (  # noqa: F401  # registration
    breadcrumbs,
    dare,
    della,
    iso_c,
    iso_cts,
    karcher,
    linear,
    model_stock,
    multislerp,
    rtsvm,
    sce,
    slerp,
    star,
    task_arithmetic,
    ties,
    tsvm,
)
from .base import (
    METHODS,
    Cost,
    Job,
    MergeResult,
    Method,
    MethodParameters,
    TensorReport,
    elementwise_cost,
    factored_cost,
    get_method,
    nearest,
    task_matrices,
    timed,
)
from .task_arithmetic import mean_task_vector

__all__ = [
    "METHODS",
    "Cost",
    "Job",
    "MergeResult",
    "Method",
    "MethodParameters",
    "TensorReport",
    "elementwise_cost",
    "factored_cost",
    "get_method",
    "mean_task_vector",
    "nearest",
    "task_matrices",
    "timed",
]
