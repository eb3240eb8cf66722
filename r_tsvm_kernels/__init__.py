"""Fast, exact kernels for merging fine-tuned models: R-TSVM, TSV-Merge and their family.

Importing this package is fast: torch is loaded when a function is first used, and a GPU is initialised when a tensor is
on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterRefusedError,
    BackendUnavailableError,
    CheckpointError,
    ClusterError,
    ConfigError,
    ConvergenceError,
    DeviceError,
    DiskFullError,
    DTypeError,
    EvaluationError,
    InputChangedError,
    IntegrationError,
    JournalError,
    MemoryBudgetError,
    NonFiniteError,
    OutputBusyError,
    OutputExistsError,
    OutputUnfinishedError,
    PickleRefusedError,
    QuantisedRefusedError,
    ResumeRefusedError,
    RtsvmError,
    ShapeError,
)

if TYPE_CHECKING:
    from . import linalg, ops
    from .config import MergeConfig, ModelEntry
    from .dispatch import use_backend
    from .engine import (
        CheckpointResult,
        Progress,
        PushResult,
        Verification,
        decompose_checkpoints,
        merge_checkpoints,
        push_to_hub,
        verify_output,
    )
    from .linalg import Certificate
    from .loaded_parts import Parts
    from .lora_tools import AdapterResult, extract_lora, merge_lora, parts_to_lora, resize_lora
    from .merge import merge_tensors
    from .methods import MergeResult, TensorReport
    from .state_dicts import StateDictResult, merge_models, merge_state_dicts
    from .sweep import SweepProgress, SweepResult, Trial, sweep_checkpoints

__version__ = "0.1.0"

# Loaded on first use (PEP 562).
_LAZY = {
    "linalg": ".linalg",
    "ops": ".ops",
    "MergeConfig": ".config",
    "ModelEntry": ".config",
    "use_backend": ".dispatch",
    "AdapterResult": ".lora_tools",
    "CheckpointResult": ".engine",
    "Progress": ".engine",
    "PushResult": ".engine",
    "Verification": ".engine",
    "decompose_checkpoints": ".engine",
    "extract_lora": ".lora_tools",
    "merge_checkpoints": ".engine",
    "merge_lora": ".lora_tools",
    "parts_to_lora": ".lora_tools",
    "push_to_hub": ".engine",
    "resize_lora": ".lora_tools",
    "verify_output": ".engine",
    "Certificate": ".linalg",
    "Parts": ".loaded_parts",
    "merge_tensors": ".merge",
    "MergeResult": ".methods",
    "TensorReport": ".methods",
    "StateDictResult": ".state_dicts",
    "merge_models": ".state_dicts",
    "merge_state_dicts": ".state_dicts",
    "SweepProgress": ".sweep",
    "SweepResult": ".sweep",
    "Trial": ".sweep",
    "sweep_checkpoints": ".sweep",
}

__all__ = [
    "AdapterRefusedError",
    "AdapterResult",
    "BackendUnavailableError",
    "Certificate",
    "CheckpointError",
    "CheckpointResult",
    "ClusterError",
    "ConfigError",
    "ConvergenceError",
    "DTypeError",
    "DeviceError",
    "DiskFullError",
    "EvaluationError",
    "InputChangedError",
    "IntegrationError",
    "JournalError",
    "MemoryBudgetError",
    "MergeConfig",
    "MergeResult",
    "ModelEntry",
    "NonFiniteError",
    "OutputBusyError",
    "OutputExistsError",
    "OutputUnfinishedError",
    "Parts",
    "PickleRefusedError",
    "Progress",
    "PushResult",
    "QuantisedRefusedError",
    "ResumeRefusedError",
    "RtsvmError",
    "ShapeError",
    "StateDictResult",
    "SweepProgress",
    "SweepResult",
    "TensorReport",
    "Trial",
    "Verification",
    "decompose_checkpoints",
    "extract_lora",
    "linalg",
    "merge_checkpoints",
    "merge_lora",
    "merge_models",
    "merge_state_dicts",
    "merge_tensors",
    "ops",
    "parts_to_lora",
    "push_to_hub",
    "resize_lora",
    "sweep_checkpoints",
    "use_backend",
    "verify_output",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name], __name__)
    value = module if _LAZY[name] == f".{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
