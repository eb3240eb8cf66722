"""LoRA adapters given as state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, plain_names
from .adapter_config import parse_config


class InMemoryAdapter(Adapter):
    """An adapter whose tensors are in memory, named as in PEFT's files.

    Args:
        tensors: content of ``adapter_model.safetensors``, or the result of ``peft.get_peft_model_state_dict``.
        config: content of ``adapter_config.json``, or the result of PEFT's ``LoraConfig.to_dict()``.
        name: of the adapter, for messages.

    Raises:
        CheckpointError, AdapterRefusedError: as for a folder.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "adapter") -> None:
        self.path = Path(name)
        self.config = parse_config(config, name)
        names = plain_names(tensors, name)
        self._open(_StateDict({names.get(own, own): tensor for own, tensor in tensors.items()}), name)

    def check_unchanged(self) -> None:
        """Do nothing: changes of tensors in memory are not detected."""


class _StateDict:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def load(self, name: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Tensor:
        return self.tensors[name].detach().to(device)
