"""Merge methods: a function with its parameters and its paper; and the registry that finds them by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from .. import dispatch
from ..errors import ConfigError
from ..linalg import Factored
from ..ops._checks import accumulation_dtype, plain_values
from ..text import shortened
from .reports import MergeResult, Summands

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Number = TypeVar("Number")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# A parameter with one value per fine-tuned model. In a recipe each model may set its own; one number applies to all.
_PER_MODEL = BeforeValidator(_as_tuple)
PerModel = Annotated[tuple[Number, ...], _PER_MODEL, Field(min_length=1)]


# Messages of pydantic, and plain words for them.
_PLAIN = {
    "should be a valid tuple": "should be a list",
    "should be a valid string": "should be text",
    "should be a valid integer": "should be a whole number",
    "should be a valid integer, got a number with a fractional part": "should be a whole number",
    "Value should have at least 1 item after validation, not 0": "should be a number or one per model",
    "should be a valid number": "should be a number",
    "should be a valid boolean": "should be true or false",
    "should be a valid dictionary": "should be a mapping of names to values",
}


class Strict(BaseModel):
    """A model that refuses unknown keys, takes numbers of NumPy and torch, and raises `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**{key: plain_values(value) for key, value in data.items()})
        except ValidationError as error:
            raise ConfigError(_describe(error, self.names())) from None

    @classmethod
    @cache
    def names(cls) -> Mapping[str, str]:
        """Map every accepted key (field names and aliases) to its field name."""
        keys = {name: name for name in cls.model_fields}
        keys.update({info.alias: name for name, info in cls.model_fields.items() if info.alias})
        return MappingProxyType(keys)


def _describe(error: ValidationError, known: Collection[str]) -> str:
    """Say what is wrong in one line per mistake, with the nearest valid key for unknown ones."""
    lines, wrong = list[str](), dict[str, list[Any]]()
    for item in error.errors():
        where = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            names = f"known: {', '.join(sorted(known))}"
            lines.append(f"unknown key {key!r}; {did_you_mean(key, known, names)}")
        elif isinstance(item.get("ctx", {}).get("error"), Exception):
            lines.append(f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"]))
        else:
            wrong.setdefault(where, []).append(item)  # one for each type of a union
    for where, items in wrong.items():
        messages = [item["msg"].partition(", unable")[0].removeprefix("Input ") for item in items]
        expected = ", or ".join(dict.fromkeys(_PLAIN.get(message, message) for message in messages))
        lines.append(f"{where}: {expected}, got {shortened(items[0]['input'])}")
    return "; ".join(lines)


class MethodParameters(Strict):
    """Parameters of one merge method, already evaluated for one tensor."""

    model_config = ConfigDict(populate_by_name=True)

    weight: PerModel[FiniteFloat] = Field(default=(1.0,), description="weight of each model")

    @classmethod
    def is_per_model(cls, name: str) -> bool:
        """Return whether each model may have its own value of field `name`."""
        return _PER_MODEL in cls.model_fields[name].metadata

    def for_tensor(self, name: str) -> MethodParameters:
        """Return the parameters for the tensor `name`; random methods give each tensor its own seed.

        Raises:
            ConfigError: values that contradict each other.
        """
        return self

    def check_weights(self) -> None:
        """Refuse weights that the method would divide by their sum, which is 0; most methods take any.

        Methods that elect signs do not ask: see `Method.elects`.

        Raises:
            ConfigError: the sum is 0.
        """


class Unweighted(MethodParameters):
    """Parameters of a method that weights no model; the common field `weight` must stay 1."""

    def for_tensor(self, name: str) -> MethodParameters:
        """Refuse weights.

        Raises:
            ConfigError: there is a weight.
        """
        if any(weight != 1.0 for weight in self.weight):
            method = next((own.name for own in METHODS.values() if own.parameters is type(self)), "the method")
            raise ConfigError(f"{method} has no weights, got {list(self.weight)}; leave `weight` out")
        return self


# Ops of methods that decompose matrices: the update, the mean of tensors that are none, and norms.
SPECTRAL_OPS = ("add_update", "elect_and_sum", "task_statistics")

Run = Callable[..., MergeResult]
RunBatch = Callable[..., list[MergeResult]]


@dataclass(frozen=True)
class TensorJob:
    """A tensor to be merged, described by its header and the recipe.

    Attributes:
        shape: of the tensor.
        tasks: number of fine-tuned models.
        itemsize: bytes of one element of a task vector, 4 or 8.
        device_type: ``cpu`` or ``cuda``.
        rounded: bytes of one element of the result, if the method rounds it itself; None: as wide as task vectors.
    """

    shape: tuple[int, ...]
    tasks: int
    itemsize: int
    device_type: str = "cpu"
    rounded: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def summed(self) -> int:
        """Bytes of one element of a sum by `elect_and_sum`; only the reference rounds a copy."""
        if self.rounded is None:
            return self.itemsize
        copies = dispatch.by_reference(self.device_type, "elect_and_sum")
        return self.itemsize + self.rounded if copies else self.rounded


@dataclass(frozen=True)
class Linear:
    """How a method gives the summands of its merge.

    Attributes:
        run: ``run(base, tuned, options)`` returns the `Summands`; the weights of the options are 1.
        refusal: with these options, why the merge is not linear in the weights; None if it is.
        ranks: upper bounds of the ranks of the M_t, from the job, the options and the ranks of factored task matrices,
            which are empty if a task matrix is not factored; None if nothing bounds them below min(m, n).
        spread: with these options, by how much the error of a sum may exceed that of the merge with weights 1, for
            weights up to 1.
    """

    run: Callable[[Tensor, Sequence[Any], Any], Summands]
    refusal: Callable[[Any], str | None] = lambda options: None
    ranks: Callable[[TensorJob, Any, Sequence[int]], list[int] | None] = lambda job, options, factored: None
    spread: Callable[[int, Any], float] = lambda tasks, options: 1.0


@dataclass(frozen=True)
class Cost:
    """Estimated memory and operations of a job.

    Attributes:
        bytes: upper bound of the peak memory beside the inputs, with the float result.
        flops: approximate number of floating-point operations.
    """

    bytes: int
    flops: float


def task_matrices(base: Tensor, tuned: Sequence[Tensor | Factored]) -> tuple[list[Tensor | Factored], torch.dtype]:
    """Return ``W_t - W_0`` of each model, and the dtype of the merge; `Factored` updates are returned unchanged."""
    stored = [tensor.left if isinstance(tensor, Factored) else tensor for tensor in tuned]
    dtype = accumulation_dtype(base, *stored)
    return [x if isinstance(x, Factored) else x.to(dtype) - base.to(dtype) for x in tuned], dtype


def factored_cost(job: TensorJob, ranks: Sequence[int]) -> Cost:
    """Return the cost of a merge of factored task matrices with these inner dimensions, with the merged matrix."""
    (m, n), inner = job.shape, float(sum(ranks))
    # The cost of KnOTS, four times a matrix of that many rows for each task, and of weighted cores.
    narrow = 8 * ((8 + 4 * job.tasks) * (m + n) * int(inner) + (32 + 6 * job.tasks) * int(inner) ** 2)
    flops = 2.0 * job.elements * inner + 12.0 * (m + n) * inner**2 + 40.0 * inner**3
    return Cost((9 + 7 * job.itemsize) * job.elements + narrow, flops)


def always(options: Any) -> bool:
    """Return True, for traits that no option changes."""
    return True


def elementwise_cost(job: TensorJob, options: Any) -> Cost:
    """Return the cost of a weighted sum of task vectors; the reference in torch needs temporaries, kernels do not."""
    copies = 6 * job.itemsize + 1 if dispatch.by_reference(job.device_type, "elect_and_sum") else 0
    return Cost((copies + job.summed) * job.elements, (3.0 * job.tasks + 2) * job.elements)


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        name: as written in a recipe.
        pretty_name: as printed.
        paper_url: where the method is defined.
        parameters: the model of its parameters.
        run: ``run(base, tuned, options)``; returns the merged tensor in float32 (float64 if any input is float64).
        rounds: whether `run` and `run_batch` also take `out_dtype`, and round the merged tensor to it, once.
        needs_base: whether task vectors are formed; if not, the base is an input like the models: see
            `MergeConfig.base_joins`.
        optional_base: whether task vectors are formed if there is a base, of a method that needs none; without one, its
            option `relative` is false.
        matrices_only: whether `run` takes only 2-D tensors; others get the mean task vector.
        rank_per_task: whether each task gets its own rank. A matrix with fewer rows or columns than tasks has no rank
            to share.
        mean_if_rankless: whether such matrices get the mean task vector, too.
        row_wise: whether rows may be merged separately: rows of the result depend only on the same rows of the inputs,
            to the bit.
        elects: whether, with `normalize`, it divides each element by the weights of the elected sign, never by the sum
            of all weights, so that weights may cancel.
        tasks: the only number of fine-tuned models it merges; None for any.
        copies: whether, with these options, the result is the only model, to the bit, so that its bytes can be copied;
            None if it never is.
        ops: the ops that `run`, `cost` and the mean of other tensors may call; None: any.
        factored: whether, with these options, `run` also takes all task matrices as `Factored` instead of the models.
        isotropic: whether, with these options, singular values of the update are equal by construction: they have no
            directions that a calibration could scale.
        aliases: its other names, in papers and in other tools.
        cost: memory and operations of a job with its options.
        batch: number of matrices such as this that are merged at a time, if a tensor or a checkpoint has several. It
            depends on the shape and the options alone, because it may change how sums are rounded.
        run_batch: ``run`` for a batch: the bases, the models of each, and the options; None if there is none.
        linear: how it gives the summands of its merge, if that is linear in the weights; otherwise None.
    """

    name: str
    pretty_name: str
    paper_url: str
    parameters: type[MethodParameters]
    run: Run
    rounds: bool = False
    needs_base: bool = True
    optional_base: bool = False
    matrices_only: bool = False
    rank_per_task: bool = False
    mean_if_rankless: bool = False
    row_wise: bool = False
    elects: bool = False
    tasks: int | None = None
    copies: Callable[[Any], bool] | None = None
    ops: tuple[str, ...] | None = None
    factored: Callable[[Any], bool] = lambda options: False
    isotropic: Callable[[Any], bool] = lambda options: False
    aliases: tuple[str, ...] = ()
    cost: Callable[[TensorJob, Any], Cost] = elementwise_cost
    batch: Callable[[TensorJob, Any], int] = lambda job, options: 1
    run_batch: RunBatch | None = None
    linear: Linear | None = None

    def forms_vectors(self, has_base: bool) -> bool:
        """Whether it merges differences from a base, where there is one or not."""
        return self.needs_base or (self.optional_base and has_base)

    def wrong_number(self, tasks: int) -> str:
        """Say how many models the method merges, for a recipe with another number of them."""
        if not self.needs_base:
            beside = " beside the base" if self.optional_base else ""
            models = f"{self.tasks} model{'s' if self.tasks != 1 else ''}"
            return f"{self.name} takes {models} for each tensor{beside}, got {tasks}"
        return (
            f"{self.name} merges the base with {self.tasks} fine-tuned model, got {tasks}; multislerp and karcher "
            "merge several"
        )


METHODS: dict[str, Method] = {}


def register(
    name: str, *, pretty_name: str, paper_url: str, parameters: type[MethodParameters], **traits: Any
) -> Callable[[Run], Run]:
    """Register the decorated function as merge method `name`; `traits` are the other fields of `Method`.

    It also takes parameters that require grad; its results carry no graph.
    """

    def decorate(run: Run) -> Run:
        run = torch.no_grad()(run)
        METHODS[name] = Method(name, pretty_name, paper_url, parameters, run, **traits)
        return run

    return decorate


def nearest(word: str, candidates: Sequence[str]) -> str:
    """Return the candidate most like `word`."""
    return difflib.get_close_matches(word, candidates, n=1, cutoff=0.0)[0]


def did_you_mean(word: str, candidates: Iterable[str], rest: str, where: Mapping[str, str] | None = None) -> str:
    """Return a message that asks for the candidate most like `word`, unless none is like it, and goes on with `rest`.

    Args:
        word: what was given.
        candidates: what is known.
        rest: the message without the question.
        where: for some candidates, text that says where they belong.
    """
    close = difflib.get_close_matches(word, list(candidates), n=1)
    if not close:
        return rest
    return f"did you mean {close[0]!r}{(where or {}).get(close[0], '')}? {_sentence(rest)}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def get_method(name: str) -> Method:
    """Look up a merge method by its name or an alias.

    Raises:
        ConfigError: there is no method of that name.
    """
    if name in METHODS:
        return METHODS[name]
    by_name = METHODS | {alias: method for method in METHODS.values() for alias in method.aliases}
    if name not in by_name:
        names = f"available: {', '.join(sorted(METHODS))}"
        raise ConfigError(f"unknown merge method {name!r}; {did_you_mean(name.lower(), by_name, names)}")
    return by_name[name]
