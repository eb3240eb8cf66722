"""Merge methods, one short file each. Importing this package registers them."""

from . import linear, rtsvm, task_arithmetic, tsvm  # noqa: F401  # registration
from .base import METHODS, MergeResult, Method, MethodParameters, TensorReport, get_method, nearest
from .task_arithmetic import mean_task_vector

__all__ = [
    "METHODS",
    "MergeResult",
    "Method",
    "MethodParameters",
    "TensorReport",
    "get_method",
    "mean_task_vector",
    "nearest",
]
