"""Read and write PEFT LoRA adapters on disk, one module at a time, as `Factored`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, FileState, ShardFile, ShardLayout, TensorHeader, TensorSpec, byte_view
from ..checkpoint.hub import resolve
from ..checkpoint.reader import require_unchanged
from ..errors import AdapterRefusedError, CheckpointError, NonFiniteError, PickleRefusedError, ShapeError
from ..experts import is_of_one_expert, is_router
from ..files import write_json
from ..linalg import Factored
from ..ops._checks import FLOAT_DTYPES, check_finite, is_finite
from ..text import dtype_name
from .adapter_config import CONFIG_FILE, make_config, read_config
from .changes import Change

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Endings of the names of A and B: of a linear module, of an embedding.
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
# Copy of the base weight, which PEFT stores beside the factors of embeddings and heads.
BASE_LAYER = ".base_layer.weight"


# Names in a checkpoint of a training: with the name of the adapter.
_NAMED = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.(?!weight$)(?P<adapter>\w+)(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>\w+)\.(?P<rest>.+)")


class Weights(Protocol):
    """Source of an `Adapter`: a checkpoint, or tensors in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorHeader | Tensor]:
        """Shape, dtype and size of every tensor, by name."""

    def load(self, name: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Tensor:
        """Return one tensor."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted module.

    Attributes:
        name: in the base model, e.g. ``model.layers.0.self_attn.q_proj``.
        rank: inner dimension of the factors.
        scale: factor of ``B @ A``.
        shape: of ``B @ A``.
        embedding: whether it is an embedding, which PEFT names and orients differently.
        transposed: whether the weight is stored as the transpose of ``B @ A``.
        nbytes: size of the factors.
    """

    name: str
    rank: int
    scale: float
    shape: tuple[int, int]
    embedding: bool
    transposed: bool
    nbytes: int

    @property
    def weight_name(self) -> str:
        """Name of the weight in the base model."""
        return f"{self.name}.weight"

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight in the base model."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


class Adapter:
    """A folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Only headers are read before `load`.

    Args:
        path: the folder, or the Hugging Face id of the adapter.
        allow_pickle: read ``adapter_model.bin`` if there is nothing else; only tensors are unpickled.

    Attributes:
        path: the folder.
        config: the settings that decide the update.
        modules: the adapted modules, by name.
        base_layers: names of the modules, embeddings and heads, whose base weight is stored in the adapter, too.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
        AdapterRefusedError: the adapter does more than add a low-rank matrix to weights.
        PickleRefusedError: the weights exist only as pickle.
    """

    # Settings of a config beyond plain LoRA that a subclass can carry out.
    accepted: frozenset[str] = frozenset()

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        self.path = resolve(str(path))
        self.config, self._config_state = read_config(self.path, self.accepted)
        weights = self.path / WEIGHTS_FILE
        if not weights.exists() and (pickled := self.path / "adapter_model.bin").exists():
            if not allow_pickle:
                raise PickleRefusedError(
                    f"{self.path}: only pickled weights (adapter_model.bin), which can run code when they are loaded; "
                    "`rtsvm merge --allow-pickle` reads the tensors alone, or load the adapter with PEFT and save it "
                    "again"
                )
            weights = pickled
        self._file = Checkpoint(weights, allow_pickle=allow_pickle)
        self._file.rename(plain_names(self._file.tensors, str(weights)))
        self._open(self._file, str(weights))

    def load(self, module: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Factored:
        """Read the update of a module in PEFT's orientation, ``scale * B @ A``, (out, in).

        Raises:
            InputChangedError, CheckpointError: the file cannot be read, or has changed.
            NonFiniteError: a factor holds NaN or infinity.
        """
        A, B = (self._weights.load(name, device, pin=pin) for name in self._names(module))
        for factor in (A, B):
            check_finite(factor, f"{self.path}: {module}")
        if A.dtype != B.dtype:
            A, B = (factor.to(torch.promote_types(A.dtype, B.dtype)) for factor in (A, B))
        return Factored(B, A, self.modules[module].scale)

    def task_matrix(self, module: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Factored:
        """Read the update of a module, oriented as its weight is stored in the base model.

        Raises:
            InputChangedError, CheckpointError, NonFiniteError: as `load`.
        """
        matrix = self.load(module, device, pin=pin)
        return transposed(matrix) if self.modules[module].transposed else matrix

    def load_change(self, key: str, *, pin: bool = False) -> Factored | Change:
        """Read the change of a weight; see `weight_shapes` for its key.

        Raises:
            InputChangedError, CheckpointError, NonFiniteError: as `load`.
        """
        return self.task_matrix(key, pin=pin)

    def weight_in(self, base: Iterable[str], name: str) -> str | None:
        """Return the base's name of a weight if this kind of adapter has names of its own; otherwise None."""
        return None

    def find_experts(self, base: Mapping[str, TensorHeader]) -> None:
        """Find the packed experts of a base that the adapter changes: none."""

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield name and shape of every weight that is changed, as the base stores it, and the key of the change."""
        for module in self.modules.values():
            yield module.weight_name, module.weight_shape, module.name

    def replaces(self, key: str) -> bool:
        """Whether a change is another value of the whole tensor."""
        return False

    def copies_of(self, key: str) -> list[str]:
        """Return the names of other weights that the adapter gives the same values, as if they were tied."""
        return []

    def is_product(self, key: str) -> bool:
        """Whether a change is a product of two factors."""
        return True

    def load_base_layer(self, module: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """Read the base weight, or some of its rows, that the adapter stores for a module of `base_layers`.

        Raises:
            InputChangedError, CheckpointError: the file cannot be read, or has changed.
        """
        name = base_layer_name(module)
        return self._weights.load(name) if rows is None else self._file.load(name, rows=rows)

    def base_layer_header(self, module: str) -> TensorHeader:
        """Return the header of the weight that `load_base_layer` reads."""
        return self._file.tensors[base_layer_name(module)]

    def headers(self, key: str) -> tuple[TensorHeader, ...]:
        """Return the headers of A and B."""
        return tuple(self._file.tensors[name] for name in self._names(key))

    def files(self) -> tuple[FileState, ...]:
        """Return the files of the adapter, with their state at opening."""
        return (self._config_state, *self._file.files())

    def check_unchanged(self) -> None:
        """Compare size and times of both files with their state at opening.

        Raises:
            InputChangedError: a file has changed or is missing.
        """
        require_unchanged(self._config_state.path, self._config_state)
        self._file.check_unchanged()

    def _names(self, module: str) -> tuple[str, str]:
        """Return the names of A and B in the file."""
        a, b = EMBEDDING if self.modules[module].embedding else LINEAR
        return PREFIX + module + a, PREFIX + module + b

    def _open(self, weights: Weights, source: str) -> None:
        """Find the modules; `source` is for messages."""
        self._weights = weights
        self.modules = {module.name: module for module in self._find_modules(source)}
        names = (name.removeprefix(PREFIX) for name in weights.tensors if name.endswith(BASE_LAYER))
        self.base_layers = [name.removesuffix(BASE_LAYER) for name in names]
        for module_name in self.base_layers:
            if module_name not in self.modules:
                raise AdapterRefusedError(f"{source}: {module_name} is replaced, not adapted; not supported")

    def _find_modules(self, source: str) -> Iterator[LoraModule]:
        tensors = self._weights.tensors
        for name, header in tensors.items():
            if name.startswith(PREFIX) and name.endswith(BASE_LAYER):
                continue
            endings = next((pair for pair in (LINEAR, EMBEDDING) if name.endswith(pair)), None)
            if endings is None or not name.startswith(PREFIX):
                raise AdapterRefusedError(f"{source}: {name} is not a factor of a LoRA update; {_meaning(name)}")
            module = name.removeprefix(PREFIX).removesuffix(endings[0]).removesuffix(endings[1])
            pair = [tensors.get(PREFIX + module + ending) for ending in endings]
            if pair[0] is None or pair[1] is None:
                raise CheckpointError(f"{source}: {name} lacks the other factor")
            if not name.endswith(endings[0]):
                continue
            A, B = pair[0].shape, pair[1].shape
            if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
                raise AdapterRefusedError(f"{source}: {module} has factors {A} and {B}; expected (r, in) and (out, r)")
            if not {pair[0].dtype, pair[1].dtype} <= set(FLOAT_DTYPES):
                raise AdapterRefusedError(f"{source}: the factors of {module} are {header.dtype}, not floating-point")
            if self.config.rank(module) != A[0]:
                raise CheckpointError(
                    f"{source}: {module} has rank {A[0]}, {CONFIG_FILE} says {self.config.rank(module)}"
                )
            embedding = endings is EMBEDDING
            turned = embedding or (self.config.fan_in_fan_out and not is_head(module))
            scale, nbytes = self.config.scale(module, A[0]), pair[0].nbytes + pair[1].nbytes
            yield LoraModule(module, A[0], scale, (B[0], A[1]), embedding, turned, nbytes)


class AdapterWriter:
    """Write an adapter one module at a time; a context manager.

    Experts and routers of a mixture of experts get one rank, the largest of the adapter, with factors of zeros where
    theirs is smaller.

    Factors are kept in an unnamed file until the end, because the header precedes them and needs all ranks.

    Args:
        folder: an existing folder.
        dtype: dtype of the stored factors.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.ranks: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        self._places: dict[str, tuple[int, TensorSpec]] = {}
        self._waiting = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by __exit__

    def add(self, module: str, matrix: Factored, *, embedding: bool = False) -> None:
        """Add the update of a module in PEFT's orientation, (out, in); leave out updates of rank 0, which PEFT lacks.

        Raises:
            NonFiniteError: a factor does not fit `dtype`.
            OSError: writing failed.
        """
        rank = matrix.left.shape[1]
        if not rank and not is_of_one_expert(module):
            return
        for name, factor in stored_factors(module, matrix, self.dtype, embedding=embedding).items():
            self._store(name, factor.cpu())
        self.ranks[module], self._scales[module] = rank, matrix.scale

    def add_base_layer(self, module: str, weight: Tensor) -> None:
        """Store the base weight beside the factors of a module; see `Adapter.base_layers`.

        Raises:
            OSError: writing failed.
        """
        if module in self.ranks:
            self._store(base_layer_name(module), weight)

    def finish(self, *, base: str | None, task_type: str | None, fan_in_fan_out: bool = False) -> None:
        """Write the two files.

        Args:
            base: ``base_model_name_or_path`` of the config.
            task_type: PEFT's name of the task, e.g. ``CAUSAL_LM``.
            fan_in_fan_out: whether weights of the base are stored (in, out).

        Raises:
            CheckpointError: no module was added, or writing failed.
        """
        if not any(self.ranks.values()):
            raise CheckpointError("nothing to write: no module is changed")
        widened = self._give_experts_one_rank()
        # Wide dtypes first, which keeps every tensor aligned to its element size.
        places = dict(sorted(self._places.items(), key=lambda item: -item[1][1].dtype.itemsize))
        specs = {name: TensorSpec(spec.dtype, widened.get(name, spec.shape)) for name, (_, spec) in places.items()}
        layout = ShardLayout(WEIGHTS_FILE, specs)
        with ShardFile.create(self.folder / WEIGHTS_FILE, layout) as file:
            for name, (offset, spec) in places.items():
                values = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
                if values.numel():
                    self._waiting.seek(offset)
                    self._waiting.readinto(byte_view(values))
                if spec.shape != specs[name].shape:
                    narrow, values = values, torch.zeros(specs[name].shape, dtype=spec.dtype, device="cpu")
                    values[: spec.shape[0], : spec.shape[1]] = narrow
                file.write(name, values)
        config = make_config(self.ranks, self._scales, base=base, task_type=task_type, fan_in_fan_out=fan_in_fan_out)
        write_json(self.folder / CONFIG_FILE, config)

    def _give_experts_one_rank(self) -> dict[str, tuple[int, int]]:
        """Raise the rank of experts and routers to the largest, and return the new shapes of their factors.

        transformers 5 stacks the factors of experts, and adapts routers without patterns of ranks.
        """
        experts = [module for module in self.ranks if is_of_one_expert(module)]
        rank, shapes = max(self.ranks.values()), {}
        if not any(self.ranks[module] for module in experts):  # no expert has changed
            for module in experts:
                del self.ranks[module]
                for ending in LINEAR:
                    del self._places[PREFIX + module + ending]
            experts = []
        routers = [module for module in self.ranks if is_router(f"{module}.weight")] if experts else []
        for module in experts + routers:
            for ending, axis in zip(LINEAR, (0, 1), strict=True):
                name = PREFIX + module + ending
                shape = list(self._places[name][1].shape)
                shape[axis] = rank
                shapes[name] = (shape[0], shape[1])
            self.ranks[module] = rank
        return shapes

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._waiting.close()

    def _store(self, name: str, tensor: Tensor) -> None:
        self._places[name] = (self._waiting.tell(), TensorSpec(tensor.dtype, tuple(tensor.shape)))
        self._waiting.write(byte_view(tensor))


def stored_factors(module: str, matrix: Factored, dtype: torch.dtype, *, embedding: bool = False) -> dict[str, Tensor]:
    """Return lora_A and lora_B of a module by their names in PEFT's files; the scale is part of the config.

    Raises:
        NonFiniteError: a factor does not fit `dtype`.
    """
    endings = EMBEDDING if embedding else LINEAR
    stored = {
        PREFIX + module + ending: factor.to(dtype)
        for ending, factor in zip(endings, (matrix.right, matrix.left), strict=True)
    }
    if not all(map(is_finite, stored.values())):
        raise NonFiniteError(
            f"{module}: the factors of the update do not fit {dtype_name(dtype)}; "
            "choose a wider dtype or smaller weights"
        )
    return stored


def base_layer_name(module: str) -> str:
    """Return the name of the base weight that is stored beside the factors of a module."""
    return PREFIX + module + BASE_LAYER


def common_modules(sources: Sequence[Adapter]) -> list[str]:
    """Return the names of the modules of all adapters, in the order of the adapters.

    Raises:
        ShapeError: the adapters do not belong to one base.
    """
    found = {name: module for source in sources for name, module in source.modules.items()}
    for source in sources:
        for name, module in source.modules.items():
            facts, expected = ((m.shape, m.embedding, m.transposed) for m in (module, found[name]))
            if facts != expected:
                raise ShapeError(
                    f"{source.path}: the update of {name} is {facts[0]}, another adapter has {expected[0]}, or stores "
                    "it in another way; all adapters must belong to one base"
                )
    return list(found)


def common_base_layers(sources: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and base weight of every module whose base weight an adapter stores.

    Raises:
        CheckpointError: adapters store different base weights, so they do not belong to one base.
    """
    for name in dict.fromkeys(name for source in sources for name in source.base_layers):
        first, *others = (source for source in sources if name in source.base_layers)
        weight = first.load_base_layer(name)
        for other in others:
            if not torch.equal(weight, other.load_base_layer(name)):
                raise CheckpointError(
                    f"{other.path}: its base weight of {name} differs from that of {first.path}; was a vocabulary "
                    "resized? All adapters must belong to one base"
                )
        yield name, weight


def transposed(matrix: Factored) -> Factored:
    """Return the transpose of a factored matrix."""
    return Factored(matrix.right.mT, matrix.left.mT, matrix.scale)


def is_head(module: str) -> bool:
    """Whether a module is an output head, which is never stored transposed."""
    return module.rpartition(".")[2] in ("lm_head", "embed_out")


def plain_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Map names that hold the name of an adapter, as in checkpoints of a training, to the names in PEFT's files.

    Raises:
        AdapterRefusedError: the file holds several adapters.

    Examples:
        >>> plain_names(["base_model.model.q.lora_A.default.weight"], "file")
        {'base_model.model.q.lora_A.default.weight': 'base_model.model.q.lora_A.weight'}
    """
    found, adapters = {}, set()
    for name in names:
        match = _NAMED.fullmatch(name)
        if match:
            adapters.add(match["adapter"])
            end = "" if match["kind"].startswith(("lora_embedding", "lora_magnitude")) else ".weight"
            found[name] = f"{match['module']}.{match['kind']}{end}"
        elif match := _SAVED.fullmatch(name):
            adapters.add(match["adapter"])
            found[name] = f"{match['module']}.{match['rest']}"
    if len(adapters) > 1:
        raise AdapterRefusedError(f"{source}: holds several adapters: {', '.join(sorted(adapters))}; save one of them")
    return found


def _meaning(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported here; it can be merged into a model (rtsvm merge)"
    if ".base_layer." in name:
        return "adapters inside adapters, as those of bare parameters, are not supported"
    return (
        "adapters that replace or add whole tensors (modules_to_save, biases) are not supported here; if their config "
        "says so, they can be merged into a model (rtsvm merge)"
    )
