"""Models with modules in folders of their own, as in sentence-transformers and diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .folders import WeightFiles, find_weights, holds_weights
from .headers import FileState, read_json, read_json_list

# Endings of output files, which folders must not have.
_FILE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".html", ".md", ".yaml", ".py")


@dataclass(frozen=True)
class Module:
    """A folder with weights.

    Attributes:
        folder: path relative to the model's folder, with slashes; empty for the model's folder.
        prefix: prefix of its tensors' names, which makes them differ from those of other modules: ``2_Dense/``. Empty
            for the main module, whose names are those of a model without further modules.
        weights: its weight files.
    """

    folder: str
    prefix: str
    weights: WeightFiles


@dataclass(frozen=True)
class ModelFiles:
    """Folders and modules of a model.

    Attributes:
        folders: paths of all folders relative to the model's; the first is that folder, an empty name.
        modules: the folders with weights.
        main: the folder with the configuration and tokenizer of the model.
        states: states of the files that list the folders.
    """

    folders: tuple[str, ...]
    modules: tuple[Module, ...]
    main: str = ""
    states: tuple[FileState, ...] = ()


def find_modules(path: Path, allow_pickle: bool) -> ModelFiles:
    """Find the weights of a model: in its folder and those of its list of modules, or a single file.

    The list is ``modules.json`` or ``model_index.json``.

    Raises:
        CheckpointError, PickleRefusedError: as `find_weights`; or the list is damaged, or names a folder that is
            missing or outside of the model's folder.
    """
    kinds, states = named_folders(path)
    pipeline = not lexists(path / "modules.json")
    missing = [folder for folder in kinds if not (path / folder).is_dir()]
    for folder in missing:
        # A component of a pipeline may be in the model's own folder. A module that only normalises has no files, and
        # git stores no empty folders.
        if not pipeline and kinds[folder] != "Normalize":
            raise CheckpointError(
                f"{path}: modules.json names the folder {folder}, which is missing; the download may be incomplete "
                "(if the module has no files, make an empty folder)"
            )
    folders = ("", *(folder for folder in kinds if folder not in missing))
    # Without any weights, searching the model's own folder raises the error that says what was expected.
    found = [folder for folder in folders if holds_weights(path / folder)] if len(folders) > 1 else []
    found = found or [""]
    main = "" if pipeline else found[0]
    modules = (
        Module(folder, "" if folder == main else f"{folder}/", find_weights(path / folder, allow_pickle))
        for folder in found
    )
    return ModelFiles(folders, tuple(modules), main, states)


def named_folders(model: Path) -> tuple[dict[str, str], tuple[FileState, ...]]:
    """Read a model's list of modules.

    Returns:
        The folders that it names, existing or not, each with the class of its module; and the states of the files of
        the list.

    Raises:
        CheckpointError: a list is damaged, or names a folder outside of the model's.
    """
    states: list[FileState] = []
    # A dangling link is an error, not a model without modules.
    if lexists(model / "modules.json"):
        found = dict(_sentence_modules(model, states))
    elif lexists(model / "model_index.json"):
        found = dict(_components(model, states))
    else:
        found = {}
    return found, tuple(states)


def _sentence_modules(model: Path, states: list[FileState]) -> Iterator[tuple[str, str]]:
    """Yield the folders of ``modules.json``; a router has its own modules in folders below its own."""
    file = model / "modules.json"
    entries, state = read_json_list(file)
    states.append(state)
    for entry in entries:
        folder, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(folder, str) or not isinstance(kind, str):
            raise CheckpointError(f"{file}: expected a list of modules, each with a path and a type; got {entry!a:.80}")
        kind = kind.rpartition(".")[2]
        if folder:
            yield _checked(file, folder), kind
        if kind in ("Router", "Asym") and (model / folder).is_dir():
            for route, route_kind in _routes(model / folder, states):
                yield str(PurePosixPath(folder, route)), route_kind


def _routes(router: Path, states: list[FileState]) -> Iterator[tuple[str, str]]:
    """Yield the folders that the configuration of a router names; its older form is ``config.json``."""
    file = router / "router_config.json"
    file = file if file.exists() else router / "config.json"
    config, state = read_json(file)
    states.append(state)
    types = config.get("types")
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise CheckpointError(f"{file}: expected the types of the router's modules, by the names of their folders")
    for folder, kind in types.items():
        yield _checked(file, folder), kind.rpartition(".")[2]


def _components(model: Path, states: list[FileState]) -> Iterator[tuple[str, str]]:
    """Yield the folders of the components that ``model_index.json`` names."""
    file = model / "model_index.json"
    index, state = read_json(file)
    states.append(state)
    for name, value in index.items():
        if isinstance(value, list) and any(value):
            yield _checked(file, name), str(value[-1])


def _checked(file: Path, folder: str) -> str:
    """Return the name of a folder in the list `file` if it is safe and inside the model's folder."""
    inside = folder.isprintable() and not any(part in ("", ".", "..") for part in folder.split("/"))
    if not inside or set(folder) & {"\\", ":"} or len(folder.encode()) > 255 or folder.lower().endswith(_FILE_SUFFIXES):
        raise CheckpointError(f"{file}: {folder[:60]!a} is not a folder inside this one; the list is not safe")
    return folder
