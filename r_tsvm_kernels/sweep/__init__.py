"""Merge a recipe with many values of its parameters, evaluate each candidate, and keep the best."""

from .axes import Axis, Range
from .plan import GroupPlan, SweepPlan, plan_sweep
from .results import SweepResult
from .run import SweepProgress, sweep_checkpoints
from .trial import Trial

__all__ = [
    "Axis",
    "GroupPlan",
    "Range",
    "SweepPlan",
    "SweepProgress",
    "SweepResult",
    "Trial",
    "plan_sweep",
    "sweep_checkpoints",
]
