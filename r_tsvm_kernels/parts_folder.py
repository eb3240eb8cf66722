"""The folder of parts: ``parts.json``, and a safetensors file for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .checkpoint import FileState, read_json
from .errors import CheckpointError, ConfigError
from .linalg import BACKWARD_ERROR, Certificate
from .linalg.certificate import CANCELLED

PARTS_FILE = "parts.json"
FORMAT = 1
# Endings of the names of the two factors of a part.
LEFT, RIGHT = ":left", ":right"

Kind = Literal["factors", "dense", "base"]

# Rounding of the last products and of their sum, in units of the dtype's epsilon and of the norms of the summands.
ROUNDING = 4


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Model):
    """One task of a folder of parts.

    Attributes:
        name: the name that weights are given to; also that of the file.
        model: the model that was decomposed, as the recipe names it.
    """

    name: str
    model: str

    @property
    def file(self) -> str:
        """Name of the file with its parts."""
        return f"{self.name}.safetensors"


class TensorParts(_Model):
    """The parts of one tensor, with the numbers for the certificates of merges.

    Attributes:
        kind: ``factors`` (two factors of each part), ``dense``, or ``base`` (there are none: the base's value stays).
        shape: of the tensor.
        base: checksum of the base's tensor.
        treatment: ``merge``, ``mean`` or ``base``, see `TensorReport`.
        reason: of the treatment.
        ranks: of the parts of each task; columns of the factors beyond them are zero.
        products: ``<M_s, M_t>`` of all parts, (T, T).
        error: estimated error of the merge with weights 1 and alpha 1, in the units of the weights.
        spread: by how much the error of another sum may exceed it, for weights up to 1.
        rounding: norm of what storing changed, of each task.
        certificate: of the merge with weights 1; None if there was no decomposition.
    """

    kind: Kind
    shape: tuple[int, ...]
    base: str
    treatment: str
    reason: str = ""
    ranks: tuple[int, ...] = ()
    products: tuple[tuple[float, ...], ...] = ()
    error: float = 0.0
    spread: float = 1.0
    rounding: tuple[float, ...] = ()
    certificate: dict[str, Any] | None = None

    def cut(self, rank: int | None) -> TensorParts:
        """Return what is known of the parts at a lower rank: no certificate holds for them."""
        if rank is None or self.kind != "factors" or max(self.ranks, default=0) <= rank:
            return self
        return self.model_copy(update={"ranks": tuple(min(rank, own) for own in self.ranks), "certificate": None})

    def norm(self, weights: Sequence[float]) -> float:
        """Return the Frobenius norm of ``sum_t w_t M_t``."""
        w = torch.tensor(list(weights), dtype=torch.float64, device="cpu")
        products = torch.tensor(self.products, dtype=torch.float64, device="cpu").reshape(len(w), len(w))
        return float((w @ products @ w).clamp(min=0).sqrt())

    def certificate_of(self, weights: Sequence[float], dtype: torch.dtype, tolerance: float) -> Certificate | None:
        """Return the certificate of ``sum_t w_t M_t``; None if the parts are differences, not decompositions.

        The error of the sum is at most that of the merge with weights 1 times the largest weight, and what storing and
        summing round. It is relative to the norm of the sum.

        Args:
            weights: T weights.
            dtype: that the sum is formed in.
            tolerance: limit of the error.
        """
        if self.certificate is None:
            return None
        norms = [math.sqrt(max(0.0, row[index])) for index, row in enumerate(self.products)]
        summed = sum(abs(w) * norm for w, norm in zip(weights, norms, strict=True))
        size = max(self.norm(weights), CANCELLED * summed)
        error = max(map(abs, weights)) * self.error * self.spread + ROUNDING * torch.finfo(dtype).eps * summed
        error += sum(abs(w) * rounding for w, rounding in zip(weights, self.rounding, strict=True))
        known = _CERTIFICATE.validate_python(self.certificate)
        return replace(known, error=error / size if size else BACKWARD_ERROR, tolerance=tolerance)


_CERTIFICATE = TypeAdapter(Certificate)


class _Content(_Model):
    format: Literal[1]
    version: str
    recipe: dict[str, Any]
    tasks: tuple[Task, ...]
    tensors: dict[str, TensorParts]


class PartsFolder:
    """A folder of parts, opened for reading.

    Attributes:
        path: the folder.
        recipe: the recipe that was decomposed, as a mapping: see `MergeConfig.from_dict`.
        tasks: the tasks, in the order of the recipe's models.
        tensors: every tensor of the merged model, by name.
        state: of ``parts.json``.
    """

    def __init__(self, path: Path, content: _Content, state: FileState) -> None:
        self.path = path
        self.recipe, self.tasks, self.tensors = content.recipe, content.tasks, content.tensors
        self.state = state

    @classmethod
    def open(cls, path: str | Path) -> PartsFolder:
        """Read ``parts.json``.

        Raises:
            CheckpointError: it is missing or damaged, or of another version of the format.
        """
        path = Path(path)
        file = path / PARTS_FILE
        if not file.exists():
            raise CheckpointError(f"{path}: holds no {PARTS_FILE}; was it written by `rtsvm decompose`?")
        data, state = read_json(file)
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: its format is {data.get('format')!r}, and this version reads {FORMAT}; decompose again"
            )
        try:
            content = _Content.model_validate(data)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise CheckpointError(f"{file}: {where}: {wrong['msg']}; decompose again") from error
        names = [task.name for task in content.tasks]
        if not names or len(set(names)) < len(names) or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{file}: its tasks {names} are no different file names; decompose again")
        return cls(path, content, state)

    def index_of(self, task: str) -> int:
        """Return the index of a task, given by its name or by the model.

        Raises:
            ConfigError: there is none, or several have that model.
        """
        names = [found.name for found in self.tasks]
        if task in names:
            return names.index(task)
        found = [index for index, own in enumerate(self.tasks) if own.model == task]
        if len(found) != 1:
            raise ConfigError(f"{self.path}: has no task {task!r}; its tasks are {', '.join(names)}")
        return found[0]


def is_parts(path: Path) -> bool:
    """Whether a path is a folder of parts."""
    return (path / PARTS_FILE).is_file()


def content_of(
    recipe: Mapping[str, Any], tasks: Sequence[Task], tensors: Mapping[str, TensorParts], version: str
) -> dict[str, Any]:
    """Return the content of ``parts.json``."""
    content = _Content(format=1, version=version, recipe=dict(recipe), tasks=tuple(tasks), tensors=dict(tensors))
    return content.model_dump(mode="json")
