"""LoRA adapters given as state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .adapter_config import parse_config


class InMemoryAdapter(Adapter):
    """An adapter whose tensors are in memory, named as in PEFT's files.

    Args:
        tensors: what ``adapter_model.safetensors`` holds, or ``peft.get_peft_model_state_dict`` returns.
        config: what ``adapter_config.json`` holds, or PEFT's ``LoraConfig.to_dict()`` returns.
        name: of the adapter, for messages.

    Raises:
        CheckpointError, AdapterRefusedError: as for a folder.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "adapter") -> None:
        self.path = Path(name)
        self.config = parse_config(config, name)
        self._open(_StateDict(tensors), name)

    def check_unchanged(self) -> None:
        """Tensors in memory are taken to be what they were."""


class _StateDict:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def load(self, name: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Tensor:
        return self.tensors[name].detach().to(device)
