"""Recipes of several documents: the merges that come before the last, each into a folder of its own."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..config import MergeConfig, ModelEntry
from ..errors import OutputExistsError, OutputUnfinishedError, ResumeRefusedError
from ..lora.adapted_model import split_reference
from .output import journal_path, refuse_existing, report_path

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

# Name of the merge that makes a model of a base and its adapter.
BASE = "base_with_adapter"
_STEPS = ".steps"


def is_steps_folder(path: Path) -> bool:
    """Whether a folder has the name of those that hold steps until a merge ends."""
    return path.name.startswith(".") and path.name.endswith(_STEPS)


def with_base_as_step(config: MergeConfig) -> MergeConfig:
    """Return a recipe whose base is no ``model+adapter``: that becomes a model in a step of its own."""
    base = config.base_model
    if base is None or config.parts is not None or split_reference(base)[1] is None or BASE in config.steps:
        return config
    step = MergeConfig("passthrough", models=[base], dtype=config.dtype)
    models = tuple(
        ModelEntry(model=BASE, parameters=entry.parameters) if entry.model == base else entry for entry in config.models
    )
    return config.model_copy(update={"base_model": BASE, "models": models, "steps": {**config.steps, BASE: step}})


def merge_in_steps(
    config: MergeConfig,
    out: Path,
    kept: Path | None,
    merge: Callable[[MergeConfig, Path, bool], Result],
    change: Callable[[MergeConfig, Path], str | None],
    *,
    resume: bool,
    restart: bool,
) -> Result:
    """Carry out the steps of a recipe, and the merge that uses them.

    Args:
        config: the recipe.
        out: the output of the last merge.
        kept: folder that keeps the outputs of the steps; None makes one beside `out` and removes it at the end.
        merge: carries out a merge into a folder, and says whether it may resume.
        change: what has changed since a finished merge; None if the same merge would give the same bytes.
        resume: go on after a stopped merge.
        restart: start over.

    Returns:
        The result of the last merge.

    Raises:
        OutputExistsError: `out`, or a kept output of another merge, is there.
        OutputUnfinishedError: a merge into `out` was stopped, and neither `resume` nor `restart` is set.
        ResumeRefusedError: a finished step has changed; the message says how.
    """
    refuse_existing(out)
    folder = out.with_name(f".{out.name}{_STEPS}") if kept is None else kept
    places = {name: str(folder / name) for name in config.steps}
    if kept is None and folder.exists():
        _settle(folder, out, config, resume=resume, restart=restart)
    before: dict[str, MergeConfig] = {}
    for name, step in config.steps.items():
        place, own = folder / name, step.model_copy(update={"steps": dict(before), "places": places})
        before[name] = step
        if not (journal_path(place).is_file() and report_path(place).is_file()):
            _LOG.info("step %s into %s", name, place)
            merge(own, place, resume)
        elif (what := change(own, place)) is not None:
            kind = ResumeRefusedError if kept is None else OutputExistsError
            advice = (
                "start over with --restart (restart=True)" if kept is None else "remove it, or keep steps elsewhere"
            )
            raise kind(f"{place}: finished before, but the merge has changed ({what}); {advice}")
        else:
            _LOG.info("step %s: %s is finished already", name, place)
    result = merge(config.model_copy(update={"places": places}), out, resume)
    if kept is None:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _settle(folder: Path, out: Path, config: MergeConfig, *, resume: bool, restart: bool) -> None:
    """Refuse, keep or remove the folder of the steps of a stopped merge."""
    ours = {ending for name in config.steps for ending in (name, f".{name}.partial", f".{name}.partial.lock")}
    foreign = not folder.is_dir() or folder.is_symlink() or not {path.name for path in folder.iterdir()} <= ours
    if foreign and (restart or not resume):
        raise OutputUnfinishedError(
            f"{folder}: not left by this merge of several documents; remove it, or choose another output"
        )
    if restart:
        shutil.rmtree(folder)
    elif not resume:
        raise OutputUnfinishedError(
            f"{folder}: a merge of several documents into {out} was stopped; --resume (resume=True) continues it, "
            "--restart (restart=True) starts over"
        )
