"""Checkpoints on disk: read headers and tensors, plan a merge, write shards."""

from ..sizes import format_size, parse_size
from .checksum import Checksum, checksum
from .headers import FileState, TensorHeader
from .hub import is_model_id
from .plan import Footprint, InputFile, MergePlan, TensorPlan, make_plan
from .reader import Checkpoint
from .writer import ShardFile, ShardLayout, TensorSpec, plan_shards, shard_name, write_index

__all__ = [
    "Checkpoint",
    "Checksum",
    "FileState",
    "Footprint",
    "InputFile",
    "MergePlan",
    "ShardFile",
    "ShardLayout",
    "TensorHeader",
    "TensorPlan",
    "TensorSpec",
    "checksum",
    "format_size",
    "is_model_id",
    "make_plan",
    "parse_size",
    "plan_shards",
    "shard_name",
    "write_index",
]
