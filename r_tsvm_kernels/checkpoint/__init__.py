"""Checkpoints on disk: read headers and tensors, write shards and indexes."""

from .checksums import Checksum, byte_view, checksum
from .copies import Copy, settle_copies, shared_seeds
from .headers import FileState, TensorHeader, read_json
from .hub import is_model_id
from .model_config import contradictions, layer_count
from .reader import Checkpoint
from .requantised import first_scale_row, requantise, rows_of_scale
from .scaled import ScaledHeader, without_quantisation
from .sidecar_files import SIDECAR_FOLDERS, is_sidecar_file
from .vocabulary import check_same_vocabulary
from .writer import ShardFile, ShardLayout, TensorSpec, plan_shards, shard_name, write_index

__all__ = [
    "SIDECAR_FOLDERS",
    "Checkpoint",
    "Checksum",
    "Copy",
    "FileState",
    "ScaledHeader",
    "ShardFile",
    "ShardLayout",
    "TensorHeader",
    "TensorSpec",
    "byte_view",
    "check_same_vocabulary",
    "checksum",
    "contradictions",
    "first_scale_row",
    "is_model_id",
    "is_sidecar_file",
    "layer_count",
    "plan_shards",
    "read_json",
    "requantise",
    "rows_of_scale",
    "settle_copies",
    "shard_name",
    "shared_seeds",
    "without_quantisation",
    "write_index",
]
