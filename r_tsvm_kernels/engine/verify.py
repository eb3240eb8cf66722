"""Compare an output, and its inputs, with the checksums in its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, Checksum, settle_copies
from ..config import MergeConfig
from ..errors import CheckpointError
from ..files import usable_path
from ..lora.adapted_model import AdaptedModel, adapt, is_adapter, open_adapter
from ..parts_folder import PartsFolder, is_parts
from ..plan import MergePlan, make_plan
from ..text import dtype_name
from .journal import as_report, read_journal
from .output import journal_path
from .steps import is_steps_folder
from .tiles import update_checksum


@dataclass(repr=False)
class Verification:
    """Result of a verification; every list is empty if the output is intact.

    Attributes:
        tensors: number of tensors in the journal.
        missing: tensors of the journal that are not in the output.
        extra: tensors of the output that are not in the journal.
        changed: tensors whose place, dtype, shape or values have changed.
        inputs_changed: ``FILE: tensor`` for every input tensor that has changed, if inputs were checked.
    """

    tensors: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    inputs_changed: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything matches the journal."""
        return not (self.missing or self.extra or self.changed or self.inputs_changed)

    def __repr__(self) -> str:
        kinds = {key: len(getattr(self, key)) for key in ("missing", "extra", "changed", "inputs_changed")}
        bad = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        return f"Verification({self.tensors} tensors, {bad or 'ok'})"


def verify_output(
    out: str | Path,
    *,
    inputs: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read a finished output and compare it with its journal.

    Args:
        out: folder or .safetensors file that `merge_checkpoints` wrote; it may have been moved or copied.
        inputs: also compare the input models, at the paths they had during the merge.
        allow_pickle: read inputs that are pickled.
        progress: called with the number of tensors checked and the total.

    Returns:
        The differences that were found.

    Raises:
        JournalError: the journal is missing or damaged.
        CheckpointError: the output, or an input, cannot be read, or the merge made an input in a step that is gone.
    """
    out = Path(out)
    fingerprint, finished = read_journal(journal_path(out))
    output, parts = _Output(out), is_parts(out)
    stored = {own.name for entry in finished.values() for own in entry.stored}
    found = Verification(
        len(stored),
        missing=sorted(stored - output.files.keys()),
        extra=[name for name in output.files if name not in stored],
    )
    if inputs:
        _check_steps(out, fingerprint["models"])
    recipe = fingerprint.get("recipe", {}) if inputs else {}
    plan = _divided_plan(recipe, allow_pickle)
    models = list(_opened(fingerprint["models"], allow_pickle)) if inputs and plan is None else []
    if checkpoints := [model for model in models if isinstance(model, Checkpoint)]:
        settle_copies(checkpoints[0], checkpoints[1:])
        if recipe.get("requantise"):
            checkpoints[0].show_activation_scales()
    for done, (name, entry) in enumerate(finished.items(), 1):
        shapes = {own.name: own.shape for own in entry.stored}
        if not parts and shapes.get(name) != as_report(entry.report).shape:
            (found.changed if name in shapes else found.missing).append(name)
        for own in entry.stored:
            if (here := output.find(own.name)) is not None and here != (own.place, own.checksum):
                found.changed.append(own.name)
        for model, recorded in zip(_models_of(plan, name) if plan else models, entry.inputs, strict=False):
            if recorded and _checksum_of_input(model, name) != recorded:
                found.inputs_changed.append(f"{model.path}: {name}")
        if progress:
            progress(done, len(finished))
    return found


class _Output:
    """The tensors of an output: a model, or parts, whose names begin with that of their task.

    Attributes:
        files: the file of each tensor, and its name there.
    """

    def __init__(self, out: Path) -> None:
        self.files: dict[str, tuple[Checkpoint, str]] = {}
        if is_parts(out):
            for task in PartsFolder.open(out).tasks:
                own = Checkpoint(out / task.file, as_stored=True)
                self.files |= {f"{task.name}/{name}": (own, name) for name in own.tensors}
        else:
            model = Checkpoint(out, as_stored=True)
            self.files = {name: (model, name) for name in model.tensors}
        self._root = out if out.is_dir() else out.parent

    def find(self, name: str) -> tuple[tuple[object, ...], str] | None:
        """Return place and checksum of a tensor; None if it is missing."""
        if name not in self.files:
            return None
        checkpoint, own = self.files[name]
        header = checkpoint.tensors[own]
        file = header.file.relative_to(checkpoint.folder or self._root).as_posix()
        place = (file, header.offset, header.nbytes, dtype_name(header.dtype), header.shape)
        return place, checkpoint.checksum(own)


def _check_steps(out: Path, models: Sequence[str]) -> None:
    """Refuse inputs that the merge made in steps and removed at its end.

    Raises:
        CheckpointError: there are some.
    """
    made = [path for path in map(Path, models) if is_steps_folder(path.parent) and not path.exists()]
    if made:
        raise CheckpointError(
            f"{out}: its input {made[0].name} is the output of a step (a document with a name, or a model with an "
            "adapter), which was removed when the merge ended; merge with --steps DIR, which keeps it, or verify "
            "without --inputs"
        )


def _divided_plan(recipe: Mapping[str, Any], allow_pickle: bool) -> MergePlan | None:
    """Plan a merge of slices or modules again, which says where the inputs of each tensor are; None for others."""
    config = MergeConfig(**recipe) if recipe else None
    if config is None or not (config.is_divided or config.num_layers):
        return None
    plan = make_plan(config, 2**63, allow_pickle=allow_pickle)
    return plan if plan.sections else None


def _models_of(plan: MergePlan, name: str) -> list[Checkpoint | AdaptedModel]:
    """Return the inputs of a tensor, in the order of its checksums."""
    if name not in plan.tensors:
        return []
    own = plan.section(name)
    adapted = {model.adapter: model for model in own.tuned if isinstance(model, AdaptedModel)}
    return [source if isinstance(source, Checkpoint) else adapted[source] for source in own.inputs]


def _opened(paths: Sequence[str], allow_pickle: bool) -> Iterator[Checkpoint | AdaptedModel]:
    """Open the inputs of a merge, the base first."""
    base = Checkpoint(paths[0], allow_pickle=allow_pickle)
    yield base
    for path in paths[1:]:
        if is_adapter(usable_path(path)):
            yield adapt(base, open_adapter(usable_path(path), allow_pickle))
        else:
            model = Checkpoint(path, allow_pickle=allow_pickle)
            model.take_names(base)
            yield model


def _checksum_of_input(model: Checkpoint | AdaptedModel, name: str) -> str | None:
    """Return the checksum of the part of a tensor that an input has; None if it has none."""
    if isinstance(model, Checkpoint):
        return model.checksum(name) if name in model.tensors else None
    if name not in model.modules:
        return None
    state = Checksum()
    update_checksum(state, model.adapter.load_change(model.modules[name]))
    return state.hexdigest()
