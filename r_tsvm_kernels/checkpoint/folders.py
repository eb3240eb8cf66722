"""Which files make up a model: the weights of a folder, or the files that an index names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, PickleRefusedError
from .headers import FileState, check_name, read_json
from .pickles import PICKLE_SUFFIXES

_SUFFIX = ".safetensors"
_PICKLE_ADVICE = (
    "loading pickle can run code. Convert it to safetensors first (save_pretrained does), "
    "or allow it with --allow-pickle (allow_pickle=True); then only tensors are unpickled"
)
_GGUF_ADVICE = (
    "GGUF weights; expected safetensors. Take the safetensors that they were made from, or let transformers read them: "
    "from_pretrained(FOLDER, gguf_file=FILE), then save_pretrained"
)
_INDEXES = (f"{_SUFFIX}.index.json", ".bin.index.json")
# Names of the weights that loaders look for, before any others.
_STEMS = ("model", "diffusion_pytorch_model")
# Beside Hugging Face weights: the same ones in the vendor's own layout.
_VENDORS = "consolidated"
# Files that training leaves beside the weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        files: in the order of their names.
        stem: of the files of an output, e.g. ``model``.
        index: tensor names to file names, if there is an index.
        index_state: of the index file.
        ignored: names of other safetensors files and indexes in the folder.
    """

    files: list[Path]
    stem: str
    index: dict[str, str] | None = None
    index_state: FileState | None = None
    ignored: tuple[str, ...] = ()


def find_weights(path: Path, allow_pickle: bool) -> WeightFiles:
    """Find the weights of a model folder, or take the named file.

    Safetensors take precedence over pickles, ``model.safetensors.index.json`` over ``model.safetensors``, and both over
    files of other names.

    Raises:
        CheckpointError: no candidate, or more than one, or an index that is damaged or not safe.
        PickleRefusedError: there are only pickles, which are not allowed.
    """
    if path.is_dir():
        found = _find_in_folder(path, allow_pickle)
        used = {file.name for file in found.files} | {found.index_state.path.name if found.index_state else ""}
        others = sorted({*path.glob(f"*{_SUFFIX}"), *path.glob(f"*{_SUFFIX}.index.json")})
        return replace(found, ignored=tuple(file.name for file in others if file.name not in used))
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file, and not a model id such as org/name")
    if path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise PickleRefusedError(f"{path}: pickled weights; {_PICKLE_ADVICE}")
    if path.name.endswith(_INDEXES):
        raise CheckpointError(
            f"{path}: an index; give its folder. If the folder has several, model.safetensors.index.json is read"
        )
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: {_GGUF_ADVICE}")
    if path.suffix != _SUFFIX and path.suffix not in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: expected a model folder or a .safetensors file")
    return WeightFiles([path], _stem(path.name, path.suffix))


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds files that may be weights, pickles included."""
    return folder.is_dir() and any(_is_weights(file) or file.name.endswith(_INDEXES) for file in folder.iterdir())


def _is_weights(file: Path) -> bool:
    return file.suffix == _SUFFIX or (file.suffix in PICKLE_SUFFIXES and not file.name.startswith(_NO_WEIGHTS))


def _find_in_folder(folder: Path, allow_pickle: bool) -> WeightFiles:
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    for stem in _STEMS:
        file, index = folder / f"{stem}{_SUFFIX}", folder / f"{stem}{_SUFFIX}.index.json"
        if index.exists() and not (file.exists() and _is_left_over(index, file.name)):
            return _read_index(index, _SUFFIX, allow_pickle)
        if file.exists():
            return WeightFiles([file], stem)
    indexes = sorted(folder.glob(f"*{_SUFFIX}.index.json"))
    if files or indexes:
        return _only_one(folder, files, indexes, _SUFFIX, allow_pickle)
    pickles = sorted(file for file in folder.iterdir() if _is_weights(file))
    indexes = sorted(folder.glob("*.bin.index.json"))
    if not pickles and not indexes:
        if any(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder}: {_GGUF_ADVICE}")
        raise CheckpointError(f"{folder}: no .safetensors file and no index; expected a Hugging Face model folder")
    if not allow_pickle:
        raise PickleRefusedError(f"{folder}: only pickled weights ({(pickles + indexes)[0].name}); {_PICKLE_ADVICE}")
    if (folder / "pytorch_model.bin").exists():
        return WeightFiles([folder / "pytorch_model.bin"], "model")
    return _only_one(folder, pickles, indexes, ".bin", allow_pickle)


def _only_one(folder: Path, files: list[Path], indexes: list[Path], suffix: str, allow_pickle: bool) -> WeightFiles:
    """Return the only index, else the only file; the vendor's own only if there are no others."""
    files, indexes = ([x for x in found if not x.name.startswith(_VENDORS)] or found for found in (files, indexes))
    if len(indexes) == 1:
        return _read_index(indexes[0], suffix, allow_pickle)
    if indexes:
        names = ", ".join(index.name for index in indexes)
        raise CheckpointError(f"{folder}: {len(indexes)} index files ({names}); move those away that are not meant")
    if any(file.name.startswith("adapter_model") for file in files):
        raise CheckpointError(f"{folder}: a LoRA adapter, not a model; give it beside its base, as model+adapter")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: {len(files)} {files[0].suffix} files and no index; name the one that is meant"
        )
    return WeightFiles(files, _stem(files[0].name, files[0].suffix))


def _is_left_over(index: Path, single: str) -> bool:
    """Whether an index names files that are gone, beside the single file that replaced them."""
    names = read_json(index)[0].get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else set()
    safe = all(isinstance(name, str) and "/" not in name for name in names)
    return safe and single not in names and not all((index.parent / name).is_file() for name in names)


def _read_index(file: Path, suffix: str, allow_pickle: bool) -> WeightFiles:
    """Read an index; check that every file it names exists in its folder."""
    data, state = read_json(file, strict=True)
    index = data.get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(value, str) for value in index.values()):
        raise CheckpointError(f"{file}: expected a weight_map from tensor names to file names")
    try:
        for name in index:
            check_name(name)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    names = sorted(set(index.values()))
    for name in names:
        _check_file_name(file, name, allow_pickle)
    return WeightFiles([file.parent / name for name in names], _stem(file.name, f"{suffix}.index.json"), index, state)


def _check_file_name(index_file: Path, name: str, allow_pickle: bool) -> None:
    # Only the name is checked: files of a download cache may be links to places outside the folder.
    relative = PurePosixPath(name)
    plain = not relative.is_absolute() and len(relative.parts) == 1 and relative.name not in ("..", ".")
    if not plain or "\\" in name or not name.isprintable() or len(name) > 255:
        raise CheckpointError(
            f"{index_file}: {name[:255]!a} is not a file name inside this folder; the index is not safe"
        )
    if relative.suffix != _SUFFIX and not (allow_pickle and relative.suffix in PICKLE_SUFFIXES):
        raise PickleRefusedError(f"{index_file}: {name!r} is not a .safetensors file; {_PICKLE_ADVICE}")
    if not (index_file.parent / name).is_file():
        raise CheckpointError(f"{index_file}: names {name}, which is missing; the download may be incomplete")


def _stem(name: str, suffix: str) -> str:
    stem = name.removesuffix(suffix)
    # Loaders look for safetensors under another name than for pickles.
    return "model" if stem == "pytorch_model" else stem
