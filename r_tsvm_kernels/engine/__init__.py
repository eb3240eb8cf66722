"""Engines that carry out a merge of checkpoints."""

from .local import CheckpointResult, Progress, merge_checkpoints

__all__ = ["CheckpointResult", "Progress", "merge_checkpoints"]
