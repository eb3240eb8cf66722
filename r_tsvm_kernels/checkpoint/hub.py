"""Find models by their Hugging Face id, through huggingface_hub and its local cache."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..files import exists, usable_path
from .modules import named_folders
from .sidecar_files import SIDECAR_FILES, SIDECAR_FOLDERS

_MODEL_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_WEIGHTS = ["*.safetensors"]
# The weights of some models once more, in the layout of their vendor.
_VENDORS = "consolidated*"
_PICKLES = ["pytorch_model*.bin"]


def resolve(model: str, *, allow_pickle: bool = False) -> Path:
    """Return the local path of a model. A model named by its id is downloaded unless it is in the cache.

    The environment variables of huggingface_hub (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...) apply.

    Args:
        model: a path, or ``org/name`` or ``org/name@revision``. An existing path takes precedence.
        allow_pickle: also download pickled weights, if the model has no others.

    Returns:
        The path as given, or the folder of the snapshot in the cache.

    Raises:
        ConfigError: `model` is an id, and huggingface_hub is not installed.
        CheckpointError: the model can be neither found nor downloaded.
    """
    match = _MODEL_ID.fullmatch(model)
    if match is None or not is_model_id(model):
        return usable_path(model)
    repo, revision = match["repo"], match["revision"]
    # Subfolders hold other formats of the same weights, unless the model lists them as modules.
    folder = _fetch(model, repo, revision, [*_WEIGHTS, *SIDECAR_FILES], ["*/*", _VENDORS])
    if not any(folder.glob(_WEIGHTS[0])):
        folder = _fetch(model, repo, revision, [*_WEIGHTS, *SIDECAR_FILES], ["*/*"])
    if allow_pickle and not any(folder.glob(_WEIGHTS[0])):
        folder = _fetch(model, repo, revision, [*_PICKLES, *SIDECAR_FILES], ["*/*"])
    inner = [f"{name}/{kind}" for name in SIDECAR_FOLDERS for kind in SIDECAR_FILES]
    for name in named_folders(folder)[0]:
        # Pickles too: without them a module would seem to have no weights.
        inner += [f"{escape(name)}/{kind}" for kind in (*_WEIGHTS, *_PICKLES, *SIDECAR_FILES)]
    return _fetch(model, repo, revision, inner, [])


def is_model_id(model: str) -> bool:
    """Whether `resolve` treats `model` as an id, not as a path.

    Examples:
        >>> is_model_id("org/name@main"), is_model_id("./name")
        (True, False)
    """
    return bool(_MODEL_ID.fullmatch(model)) and not exists(model)


def _fetch(model: str, repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{model}: no such folder or file; to fetch models by their id, run: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    # The class depends on the version: HTTP errors, validation, offline, no such model or revision.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{model}: no such folder or file, and fetching it from the Hugging Face hub failed: {reason} "
            f"({type(error).__name__})"
        ) from error
