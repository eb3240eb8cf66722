"""Which small files belong to a model beside its weights: configuration, tokenizer, code, licence; told by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..quantised import QUANTISATION_FILES

# What loaders read, by kind. JSON of every name: remote code and tokenizers bring their own (emoji.json, idf.json).
SIDECAR_FILES = (
    "*.json", "*.jinja", "*.py",
    "*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "*.tokenizer", "*.vocab", "*.bpe", "*.codes",
    "*vocab*.txt", "merges*.txt", "dict*.txt",
    "LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*",
)  # fmt: skip

# Of these kinds, but of an adapter, of quantised weights, of a training run or of an earlier merge; in lower case.
_FOREIGN = (
    "adapter*.json", "lora_*.json", "peft_*.json",
    *QUANTISATION_FILES,
    "*.index*.json",
    "train*.json", "eval*.json", "test_*.json", "predict_*.json", "*predictions*.json", "*_results.json",
    "*metrics*.json", "optimizer*.json", "*_state.json", "rng_state*.json", "global_step*", "*_args.json", "args.json",
    "log_history*.json", "dataset*.json", "wandb*.json",
    "ds_*.json", "*deepspeed*.json", "*accelerate*.json", "*fsdp*.json", "zero_to_fp32*.py",
    "*merge_report.json",
)  # fmt: skip
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz",
    ".tflite",
}  # fmt: skip

# Folders that transformers reads beside a model: further chat templates, and a generation loop of its own.
SIDECAR_FOLDERS = ("additional_chat_templates", "custom_generate")


def is_sidecar_file(name: str) -> bool:
    """Whether a file of this name belongs to a model, whatever its weights are.

    Weights in any format, their indexes, and what adapters, quantisation, training and earlier merges leave do not.

    Examples:
        >>> [is_sidecar_file(name) for name in ("tokenizer.json", "adapter_config.json", "LICENSE.safetensors")]
        [True, False, False]
    """
    if name.startswith(".") or not any(fnmatchcase(name, kind) for kind in SIDECAR_FILES):
        return False
    low = name.lower()
    return PurePosixPath(low).suffix not in _WEIGHTS and not any(fnmatchcase(low, kind) for kind in _FOREIGN)
