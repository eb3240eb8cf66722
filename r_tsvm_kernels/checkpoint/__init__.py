"""Checkpoints on disk: read headers and tensors, plan a merge, write shards."""

from ..sizes import format_size, parse_size
from .adapted import AdaptedModel, adapt, is_adapter
from .adapter import Adapter
from .checksum import Checksum, checksum
from .copies import settle_copies
from .headers import FileState, TensorHeader, read_json
from .hub import is_model_id
from .plan import Footprint, InputFile, MergePlan, Part, TensorPlan, make_plan
from .reader import Checkpoint
from .sidecar_files import COMPANION_FOLDERS, is_companion
from .writer import ShardFile, ShardLayout, TensorSpec, plan_shards, shard_name, write_index

__all__ = [
    "COMPANION_FOLDERS",
    "AdaptedModel",
    "Adapter",
    "Checkpoint",
    "Checksum",
    "FileState",
    "Footprint",
    "InputFile",
    "MergePlan",
    "Part",
    "ShardFile",
    "ShardLayout",
    "TensorHeader",
    "TensorPlan",
    "TensorSpec",
    "adapt",
    "checksum",
    "format_size",
    "is_adapter",
    "is_companion",
    "is_model_id",
    "make_plan",
    "parse_size",
    "plan_shards",
    "read_json",
    "settle_copies",
    "shard_name",
    "write_index",
]
