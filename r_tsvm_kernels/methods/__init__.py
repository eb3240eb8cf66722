"""Merge methods, one short file each. Importing this package registers them."""

from . import (  # noqa: F401  # registration
    breadcrumbs,
    core_space,
    dare,
    della,
    iso_c,
    iso_cts,
    karcher,
    knots,
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
]
