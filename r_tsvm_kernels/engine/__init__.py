"""Engines that carry out a merge of checkpoints."""

from .decompose import decompose_checkpoints
from .push import PushResult, push_to_hub
from .report import write_page
from .run import CheckpointResult, Progress, choose_device, choose_workers, merge_checkpoints
from .scheduling import Schedule, TensorSchedule, make_schedule, smallest_schedule
from .verify import Verification, verify_output

__all__ = [
    "CheckpointResult",
    "Progress",
    "PushResult",
    "Schedule",
    "TensorSchedule",
    "Verification",
    "choose_device",
    "choose_workers",
    "decompose_checkpoints",
    "make_schedule",
    "merge_checkpoints",
    "push_to_hub",
    "smallest_schedule",
    "verify_output",
    "write_page",
]
