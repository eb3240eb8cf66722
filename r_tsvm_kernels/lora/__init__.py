"""Read and write PEFT LoRA adapters, add them to checkpoints and cut them to a rank, without forming a dense update."""

from .adapter import (
    Adapter,
    AdapterWriter,
    LoraModule,
    base_layer_name,
    common_base_layers,
    common_modules,
    is_head,
    stored_factors,
    transposed,
)
from .adapter_config import AdapterConfig, make_config, parse_config
from .changes import Change
from .in_memory import InMemoryAdapter
from .updates import from_triplets, rank_of, truncated
from .whole_adapter import WholeAdapter

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterWriter",
    "Change",
    "InMemoryAdapter",
    "LoraModule",
    "WholeAdapter",
    "base_layer_name",
    "common_base_layers",
    "common_modules",
    "from_triplets",
    "is_head",
    "make_config",
    "parse_config",
    "rank_of",
    "stored_factors",
    "transposed",
    "truncated",
]
