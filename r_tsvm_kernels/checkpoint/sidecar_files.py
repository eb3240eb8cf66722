"""Recognise sidecar files, the small files of a model beside its weights: configuration, tokenizer, code, licence."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..quantised import QUANTISATION_FILES

# Files that loaders read, by kind. JSON files of any name, because remote code and tokenizers have their own
# (emoji.json, idf.json).
SIDECAR_FILES = (
    "*.json", "*.jinja", "*.py",
    "*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "*.tokenizer", "*.vocab", "*.bpe", "*.codes",
    "*vocab*.txt", "merges*.txt", "dict*.txt",
    "LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*",
)  # fmt: skip

# Those of them that belong to a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*vocab*.txt",
    "merges*.txt", "chat_template*", "*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "*.bpe", "tekken.json",
)  # fmt: skip

# Exceptions: files of adapters, quantised weights, training runs and earlier merges; in lower case.
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

# Folders that transformers reads: further chat templates, and a custom generation loop.
SIDECAR_FOLDERS = ("additional_chat_templates", "custom_generate")


def is_sidecar_file(name: str) -> bool:
    """Whether a file of this name is a sidecar file of a model.

    Weights in any format, their indexes, and files of adapters, quantisation, training and earlier merges are not.

    Examples:
        >>> [is_sidecar_file(name) for name in ("tokenizer.json", "adapter_config.json", "LICENSE.safetensors")]
        [True, False, False]
    """
    if name.startswith(".") or not any(fnmatchcase(name, kind) for kind in SIDECAR_FILES):
        return False
    low = name.lower()
    return PurePosixPath(low).suffix not in _WEIGHTS and not any(fnmatchcase(low, kind) for kind in _FOREIGN)


def is_tokenizer_file(name: str) -> bool:
    """Whether a sidecar file belongs to the tokenizer of a model.

    Examples:
        >>> [is_tokenizer_file(name) for name in ("tokenizer_config.json", "generation_config.json")]
        [True, False]
    """
    return is_sidecar_file(name) and any(fnmatchcase(name, kind) for kind in _TOKENIZER_FILES)
