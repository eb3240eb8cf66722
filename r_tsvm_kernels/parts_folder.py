"""The folder of parts: ``parts.json``, and a safetensors file for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError, model_validator

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
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
        checksums: of what is stored for each task: a matrix, or two factors.
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
    shape: tuple[NonNegativeInt, ...]
    base: str
    checksums: tuple[tuple[str, ...], ...]
    treatment: str
    reason: str = ""
    ranks: tuple[NonNegativeInt, ...] = ()
    products: tuple[tuple[float, ...], ...] = ()
    error: float = 0.0
    spread: float = 1.0
    rounding: tuple[float, ...] = ()
    certificate: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> TensorParts:
        tasks, stored = len(self.checksums), {"factors": 2, "dense": 1, "base": 0}[self.kind]
        counts = [len(self.products), *map(len, self.products), len(self.rounding)]
        if any(len(own) != stored for own in self.checksums) or (stored and set(counts) != {tasks}):
            raise ValueError(f"not the numbers of the same tasks, each with {stored} tensors")
        if self.kind == "factors" and (len(self.shape) != 2 or not self.ranks):
            raise ValueError("factors are of a matrix, and have ranks")
        if self.certificate is not None:
            try:
                _CERTIFICATE.validate_python(self.certificate)
            except ValidationError as error:
                raise ValueError(f"certificate: {error.errors()[0]['msg']}") from None
        return self

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
        error, summed = self._error(weights, dtype)
        size = max(self.norm(weights), CANCELLED * summed)
        known = _CERTIFICATE.validate_python(self.certificate)
        return replace(known, error=error / size if size else BACKWARD_ERROR, tolerance=tolerance)

    def error_of(self, weights: Sequence[float], dtype: torch.dtype) -> float:
        """Return the error of the sum as a share of its summands: that of the parts, whatever cancels."""
        error, summed = self._error(weights, dtype)
        return error / summed if summed else 0.0

    def _error(self, weights: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
        """Return the estimated error of the sum in the units of the weights, and the summed norms of the summands."""
        norms = [math.sqrt(max(0.0, row[index])) for index, row in enumerate(self.products)]
        summed = sum(abs(w) * norm for w, norm in zip(weights, norms, strict=True))
        error = max(map(abs, weights)) * self.error * self.spread + ROUNDING * torch.finfo(dtype).eps * summed
        return error + sum(abs(w) * rounding for w, rounding in zip(weights, self.rounding, strict=True)), summed


_CERTIFICATE = TypeAdapter(Certificate)


class _Content(_Model):
    format: Literal[1]
    version: str
    recipe: dict[str, Any]
    tasks: tuple[Task, ...]
    tensors: dict[str, TensorParts]

    @model_validator(mode="after")
    def _is_consistent(self) -> _Content:
        entries = self.recipe.get("models", [])
        models = [entry.get("model") if isinstance(entry, dict) else entry for entry in entries]
        if models != [task.model for task in self.tasks]:
            raise ValueError(f"the models of its recipe are {models}, those of its tasks are others")
        for name, own in self.tensors.items():
            if own.kind != "base" and len(own.checksums) != len(self.tasks):
                raise ValueError(f"{name} has parts of {len(own.checksums)} tasks, expected {len(self.tasks)}")
        return self


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
            one = is_parts(path.parent)
            advice = f"name the folder, {path.parent}" if one else "was it written by `rtsvm decompose`?"
            raise CheckpointError(f"{path}: holds no {PARTS_FILE}; {advice}")
        data, state = read_json(file)
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: its format is {data.get('format')!r}, and this version reads {FORMAT}; decompose again"
            )
        try:
            content = _Content.model_validate(data)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"])) or "content"
            raise CheckpointError(f"{file}: {where}: {wrong['msg']}; decompose again") from error
        names = [task.name for task in content.tasks]
        if not names or len(set(names)) < len(names) or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{file}: its tasks {names} are no different file names; decompose again")
        return cls(path, content, state)

    def check_base(self, name: str, checksum: str, base: Path) -> None:
        """Check that a tensor of a base is the one that the parts were made for.

        Args:
            name: of the tensor.
            checksum: of the base's values.
            base: path of the base, for the message.

        Raises:
            CheckpointError: it is another one.
        """
        if self.tensors[name].base != checksum:
            raise CheckpointError(
                f"{base}: {name} is not the tensor that {self.path} was made for; give the base that was decomposed, "
                "or decompose again"
            )

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
