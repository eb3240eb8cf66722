"""Engines that carry out a merge of checkpoints."""

from .adapters import AdapterResult, LeftOut, ModuleReport, extract_lora, merge_lora, resize_lora
from .report import write_page
from .run import CheckpointResult, Progress, choose_device, choose_workers, merge_checkpoints
from .schedule import Schedule, TensorSchedule, schedule, smallest_schedule
from .verify import Verification, verify_output

__all__ = [
    "AdapterResult",
    "CheckpointResult",
    "LeftOut",
    "ModuleReport",
    "Progress",
    "Schedule",
    "TensorSchedule",
    "Verification",
    "choose_device",
    "choose_workers",
    "extract_lora",
    "merge_checkpoints",
    "merge_lora",
    "resize_lora",
    "schedule",
    "smallest_schedule",
    "verify_output",
    "write_page",
]
