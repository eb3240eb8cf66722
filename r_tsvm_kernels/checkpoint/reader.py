"""Read checkpoints: which tensor lies in which file, its header, and its values one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, PickleRefused

# Names in safetensors headers.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = ".safetensors.index.json"
_PICKLE_ADVICE = "loading pickle can run code. Convert it to safetensors first (save_pretrained does)"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies and what it looks like, without its values."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A Hugging Face folder or a single .safetensors file, opened for reading; headers only until `load`.

    Attributes:
        path: as given.
        folder: where configuration and tokenizer files would lie; None for a bare file.
        stem: of the weight files, e.g. ``model``.
        tensors: header of every tensor, in the order of files and names.
        config: parsed ``config.json``; empty if there is none.

    Raises:
        CheckpointError: missing, damaged or hostile files; the message names the file.
        PickleRefused: there is no safetensors version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.folder: Path | None = self.path
            files, self.stem, index = _weight_files(self.path)
        else:
            _require_safetensors_file(self.path)
            self.folder, files, self.stem, index = None, [self.path], self.path.stem, None
        self.tensors: dict[str, TensorHeader] = {}
        for file in files:
            for name, header in _read_headers(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{self.path}: {name} is both in {self.tensors[name].file.name} and {file.name}"
                    )
                self.tensors[name] = header
        if index is not None:
            self._check_index(index)
        if not self.tensors:
            raise CheckpointError(f"{self.path}: the checkpoint holds no tensors")
        self.config: dict[str, Any] = {}
        if self.folder and (self.folder / "config.json").exists():
            self.config = _read_json(self.folder / "config.json")
        if "quantization_config" in self.config:
            raise CheckpointError(
                f"{self.path}: the checkpoint is quantised; its packed weights cannot be averaged. "
                "Dequantise it (or take the unquantised release) and merge that"
            )
        self._open: tuple[Path, Any] | None = None

    def load(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        header = self.tensors[name]
        try:
            if self._open is None or self._open[0] != header.file:
                self._open = (header.file, safe_open(str(header.file), framework="pt"))
            tensor: Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{header.file}: cannot read {name}: {error}") from error
        return tensor.to(device)

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open = None

    def _check_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            header = self.tensors.get(name)
            if header is None or header.file.name != PurePosixPath(file).name:
                raise CheckpointError(f"{self.path}: the index places {name} in {file}, but it is not there")
        unlisted = self.tensors.keys() - index.keys()
        if unlisted:
            raise CheckpointError(
                f"{self.path}: {min(unlisted)} is in a shard but not in the index; the two do not fit"
            )


def _weight_files(folder: Path) -> tuple[list[Path], str, dict[str, str] | None]:
    """Return the weight files of a folder, their stem, and the weight map if there is an index."""
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], "model", None
    if len(indexes) == 1:
        return _shards(indexes[0])
    if len(indexes) > 1:
        raise CheckpointError(f"{folder}: {len(indexes)} index files; name the .safetensors file that is meant")
    if any(file.name.startswith("adapter_model") for file in files):
        raise CheckpointError(f"{folder}: a LoRA adapter; merge it into its base model first (PEFT: merge_and_unload)")
    if len(files) == 1:
        return files, files[0].stem, None
    if files:
        raise CheckpointError(f"{folder}: {len(files)} .safetensors files and no index; name the one that is meant")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise PickleRefused(f"{folder}: only pickled weights ({pickles[0]}); {_PICKLE_ADVICE}")
    raise CheckpointError(f"{folder}: no .safetensors file and no index; expected a Hugging Face model folder")


def _shards(index_file: Path) -> tuple[list[Path], str, dict[str, str]]:
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{index_file}: expected a weight_map from tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        # By name only: the files of a download cache are links to places outside the folder, and that is fine.
        relative = PurePosixPath(name)
        if relative.is_absolute() or len(relative.parts) != 1 or relative.name in ("..", ".") or "\\" in name:
            raise CheckpointError(
                f"{index_file}: {name!r} is not a file name inside this folder; the index is not safe"
            )
        if relative.suffix != ".safetensors":
            raise PickleRefused(f"{index_file}: {name!r} is not a .safetensors file; {_PICKLE_ADVICE}")
        file = index_file.parent / name
        if not file.is_file():
            raise CheckpointError(f"{index_file}: names {name}, which is missing; the download may be incomplete")
        files.append(file)
    return files, index_file.name.removesuffix(_INDEX), weight_map


def _require_safetensors_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such folder or file; models are read from local folders, download them first"
        )
    if path.suffix in _PICKLES:
        raise PickleRefused(f"{path}: pickled weights; {_PICKLE_ADVICE}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a model folder or a .safetensors file")


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    headers = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                view = opened.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{file}: {name} has dtype {view.get_dtype()}, which cannot be merged")
                headers[name] = TensorHeader(file, dtype, tuple(view.get_shape()))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file, perhaps truncated: {error}") from error
    return headers


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data
