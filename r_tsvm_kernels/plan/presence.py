"""Compare the tensors of the models with the base's: which are missing, which are extra, and what that means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import Checkpoint, TensorHeader
from ..config import MergeConfig
from ..errors import ShapeError
from ..ops._checks import FLOAT_DTYPES
from ..text import some
from ..treatments import Treatment, check_same_names, is_computed, is_excluded


@dataclass
class Presence:
    """Which models have which tensors.

    Attributes:
        policy: the recipe's policy for missing tensors.
        models: the checkpoints that are merged; the base is one of them only if it is a model.
        headers: headers of the output's tensors: those of the base, then those of models that `missing` adds.
        beside: by model, the tensors that it has and the output lacks.
        lacking: by tensor, the models without it, if there are any.
    """

    policy: str
    models: Collection[Checkpoint]
    headers: dict[str, TensorHeader]
    beside: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    lacking: dict[str, tuple[Checkpoint, ...]] = field(default_factory=dict)

    def treatment(self, name: str, decided: Treatment) -> Treatment:
        """Return the treatment of a tensor by the policy for missing tensors, `decided` if every model has it."""
        lacking = self.lacking.get(name, ())
        if not lacking or decided.kind == "base":
            return decided
        if all(model in lacking for model in self.models):
            return Treatment("base", "only the base has it")
        where = f"missing in {some([str(checkpoint.path) for checkpoint in lacking])}"
        if self.policy != "mean_of_present" or is_computed(name):
            return Treatment("base", where)
        return Treatment("mean", f"{where}; mean of the models that have it", present_only=True)

    def notes(self) -> list[str]:
        """Return one line for each set of models that lack the same tensors."""
        sets: dict[tuple[Checkpoint, ...], list[str]] = {}
        for name, lacking in self.lacking.items():
            sets.setdefault(lacking, []).append(name)
        return [f"{some([str(x.path) for x in lacking])}: no {some(names)}" for lacking, names in sets.items()]


def compare_tensors(
    base: Checkpoint,
    others: Sequence[Checkpoint],
    models: Collection[Checkpoint],
    dropped: Collection[tuple[Checkpoint, str]],
    config: MergeConfig,
    resized: Collection[str] = (),
) -> Presence:
    """Compare names and shapes of all models with the base's; excluded tensors are not compared.

    Args:
        base: the base.
        others: the other checkpoints.
        models: those checkpoints that are merged, adapted or not.
        dropped: copies of tied tensors, which are left out.
        config: the recipe with its patterns and its policy for missing tensors.
        resized: tensors that may have any number of rows.

    Raises:
        CheckpointError: a tensor is missing or extra, and `config.missing` is ``error``.
        ShapeError: shapes differ.
    """
    own = {
        checkpoint: {n: header for n, header in checkpoint.tensors.items() if (checkpoint, n) not in dropped}
        for checkpoint in (base, *others)
    }
    found = Presence(config.missing, models, dict(own[base]))
    added_by: dict[str, Checkpoint] = {}
    for checkpoint in others:
        extra = check_same_names(own[base], own[checkpoint], str(checkpoint.path), config)
        added = [name for name in extra if _is_added(config, name, own[checkpoint])]
        for name in added:
            found.headers.setdefault(name, own[checkpoint][name])
            added_by.setdefault(name, checkpoint)
        if rest := [name for name in extra if name not in added]:
            found.beside[checkpoint.path] = tuple(rest)
    for name, header in found.headers.items():
        if is_excluded(config, name):
            continue
        for checkpoint in others:
            if name in own[checkpoint]:
                rows = name in resized
                shapes = header.shape[rows:], own[checkpoint][name].shape[rows:]
                _check_shape(name, *shapes, checkpoint.path, added_by.get(name))
        if lacking := tuple(x for x in (base, *others) if name not in own[x]):
            found.lacking[name] = lacking
    return found


def _is_added(config: MergeConfig, name: str, tensors: Mapping[str, TensorHeader]) -> bool:
    wanted = config.missing == "mean_of_present" and not is_excluded(config, name) and not is_computed(name)
    return wanted and tensors[name].dtype in FLOAT_DTYPES and 0 not in tensors[name].shape


def _check_shape(
    name: str, expected: tuple[int, ...], got: tuple[int, ...], path: Path, added_by: Checkpoint | None
) -> None:
    """Require the shape of the base, or of the model that has a tensor which the base lacks."""
    if expected != got and added_by is not None:
        raise ShapeError(f"{path}: {name} has shape {got}, {added_by.path} has {expected}, and the base has no such "
                         f"tensor; --exclude '{name}' leaves it out")  # fmt: skip
    if expected != got:
        resized = expected[1:] == got[1:] and (len(expected) == 2 or name.endswith("bias"))
        hint = f"--exclude '{name}' keeps the base's value"
        if resized:
            hint = f"was its vocabulary resized? {hint}; a merge with --vocabulary base or union aligns its tokens"
        raise ShapeError(f"{path}: {name} has shape {got}, the base has {expected}; {hint}")
