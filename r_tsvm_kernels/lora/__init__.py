"""PEFT LoRA adapters: computing with them without ever forming a dense update."""

from ..checkpoint.adapter import Adapter, AdapterWriter, LoraModule, is_head, transposed
from ..checkpoint.adapter_config import AdapterConfig
from .updates import from_triplets, rank_of, truncated

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterWriter",
    "LoraModule",
    "from_triplets",
    "is_head",
    "rank_of",
    "transposed",
    "truncated",
]
