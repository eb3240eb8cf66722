"""Checkpoints on disk: read headers and tensors, write shards and indexes."""

from .checksums import Checksum, byte_view, checksum
from .copies import Copy, settle_copies, shared_seeds
from .embeddings import embedding_height, vocabulary_tensors
from .headers import FileState, TensorHeader, read_headers, read_json, read_metadata, read_tokenizer_json
from .hub import is_model_id
from .model_config import contradictions, layer_count, layer_rules, text_config, with_layers
from .reader import Checkpoint, runs
from .requantised import first_scale_row, requantise, rows_of_scale
from .scaled import ScaledHeader, without_quantisation
from .sidecar_files import SIDECAR_FOLDERS, is_sidecar_file, is_tokenizer_file
from .tokenizers import Tokenizer, read_tokenizer, same_tokenizer
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
    "Tokenizer",
    "byte_view",
    "checksum",
    "contradictions",
    "embedding_height",
    "first_scale_row",
    "is_model_id",
    "is_sidecar_file",
    "is_tokenizer_file",
    "layer_count",
    "layer_rules",
    "plan_shards",
    "read_headers",
    "read_json",
    "read_metadata",
    "read_tokenizer",
    "read_tokenizer_json",
    "requantise",
    "rows_of_scale",
    "runs",
    "same_tokenizer",
    "settle_copies",
    "shard_name",
    "shared_seeds",
    "text_config",
    "vocabulary_tensors",
    "with_layers",
    "without_quantisation",
    "write_index",
]
