"""Checkpoints on disk: read headers and tensors, plan a merge, write shards."""

from .plan import MergePlan, TensorPlan, make_plan, parse_size
from .reader import Checkpoint, TensorHeader
from .writer import ShardWriter, TensorSpec, plan_shards, shard_name, write_index

__all__ = [
    "Checkpoint",
    "MergePlan",
    "ShardWriter",
    "TensorHeader",
    "TensorPlan",
    "TensorSpec",
    "make_plan",
    "parse_size",
    "plan_shards",
    "shard_name",
    "write_index",
]
