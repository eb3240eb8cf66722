"""Adapters that do more than add products to weights: DoRA, whole tensors, biases, tokens and convolutions.

They can be merged into models. To resize them, or to merge several into one adapter, all their parts would have to be
products: `Adapter` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import TensorHeader
from ..errors import AdapterRefusedError, CheckpointError
from ..linalg import Factored
from ..ops._checks import FLOAT_DTYPES, check_finite
from .adapter import BASE_LAYER, LINEAR, PREFIX, Adapter, Weights
from .changes import Change, Convolution, Dora, Replaced, ReplacedRows
from .expert_factors import ExpertUpdate, find_targets, module_of

_MAGNITUDE = ".lora_magnitude_vector"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_BASE_BIAS = ".base_layer.bias"


@dataclass(frozen=True)
class WholeChange:
    """A change that is more than a product.

    Attributes:
        kind: ``tensor``, ``rows``, ``convolution``, ``dora`` or ``experts``.
        names: of its tensors in the adapter.
        weight_name: of the weight in the base model.
        shape: of the weight.
        module: module of the factors; empty if there are none.
        indices: of the rows, if it replaces some.
        transposed: whether experts are stored (in, out).
    """

    kind: str
    names: tuple[str, ...]
    weight_name: str
    shape: tuple[int, ...]
    module: str = ""
    indices: tuple[int, ...] = ()
    transposed: bool = False


class WholeAdapter(Adapter):
    """An adapter for merges into models; the folder is that of an `Adapter`.

    Attributes:
        changes: the changes that are more than products, by the names of their weights in the base model.
    """

    accepted = frozenset({"use_dora", "modules_to_save", "trainable_token_indices", "bias", "target_parameters"})

    def _open(self, weights: Weights, source: str) -> None:
        names = [name for name in weights.tensors if name.startswith(PREFIX)]
        self.changes: dict[str, WholeChange] = {}
        self._expert_pairs = self._find_expert_pairs(weights, source)
        taken = {name for pairs in self._expert_pairs.values() for pair in pairs for name in pair}
        names = [name for name in names if name not in taken]
        for change in self._find_changes(weights, names, source):
            self.changes[change.weight_name] = change
            taken |= {name for name in change.names if change.kind != "dora" or name.endswith(_MAGNITUDE)}
        super()._open(Rest(weights, taken), source)
        self._weights = weights
        self._check_complete(source)

    def find_experts(self, base: Mapping[str, TensorHeader]) -> None:
        """Add the changes of packed experts, whose tensors only the base shows.

        Raises:
            CheckpointError, AdapterRefusedError: the base has no tensor that fits, or several.
        """
        targets = self.config.target_parameters or []
        found = find_targets(self._expert_pairs, self._file.tensors, targets, base, str(self.path))
        for target in found:
            facts = (target.weight_name, target.shape, target.module, (), target.transposed)
            self.changes[target.weight_name] = WholeChange("experts", target.names, *facts)

    def _find_expert_pairs(self, weights: Weights, source: str) -> dict[str, list[tuple[str, str]]]:
        """Return the names of the factors of bare parameters, by module."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name in weights.tensors:
            own = name.removeprefix(PREFIX)
            if not own.endswith(LINEAR[0]) or not self.config.target_parameters:
                continue
            module = module_of(own.removesuffix(LINEAR[0]), self.config.target_parameters)
            if module is None:
                continue
            other = name.removesuffix(LINEAR[0]) + LINEAR[1]
            if other not in weights.tensors:
                raise CheckpointError(f"{source}: {name} lacks the other factor")
            found.setdefault(module, []).append((name, other))
        return found

    def _check_complete(self, source: str) -> None:
        """Refuse an adapter that lacks what its config announces.

        Raises:
            CheckpointError: a tensor is missing.
            AdapterRefusedError: DoRA of an embedding.
        """
        kinds = {change.kind for change in self.changes.values()}
        scaled = {change.module for change in self.changes.values() if change.kind == "dora"}
        for module in self.modules.values() if self.config.use_dora else ():
            if module.embedding:
                raise AdapterRefusedError(f"{source}: DoRA of the embedding {module.name} is not supported")
            if module.name not in scaled:
                raise CheckpointError(f"{source}: use_dora is set, but {module.name} has no lora_magnitude_vector")
        replaced = [change.weight_name for change in self.changes.values() if change.kind == "tensor"]
        for name in self.config.modules_to_save or ():
            if not any(f".{name}." in f".{weight}" for weight in replaced):
                raise CheckpointError(f"{source}: modules_to_save has {name}, of which the adapter holds no tensor")
        if self.config.trainable_token_indices and "rows" not in kinds:
            raise CheckpointError(f"{source}: trainable_token_indices is set, but the adapter holds no tokens")

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield name and shape of every weight that is changed, as the base stores it, and the key of the change."""
        scaled = {change.module for change in self.changes.values() if change.kind == "dora"}
        for module in self.modules.values():
            if module.name not in scaled:
                yield module.weight_name, module.weight_shape, module.name
        for change in self.changes.values():
            yield change.weight_name, change.shape, change.weight_name

    def load_change(self, key: str, *, pin: bool = False) -> Factored | Change:
        """Read a change; see `weight_shapes` for its key.

        Raises:
            InputChangedError, CheckpointError, NonFiniteError: as `load`.
        """
        change = self.changes.get(key)
        if change is None:
            return super().load_change(key, pin=pin)
        if change.kind == "dora":
            magnitude = self._checked(change.names[-1])
            return Dora(self.load(change.module), magnitude, self.modules[change.module].transposed)
        values = [self._checked(name) for name in change.names]
        if change.kind == "tensor":
            return Replaced(values[0])
        if change.kind == "experts":
            A, B = values
            experts = change.shape[0] if len(change.shape) == 3 else 1
            scale = self.config.scale(change.module, A.shape[0] // experts)
            return ExpertUpdate(A, B, scale, experts, change.transposed)
        if change.kind == "rows":
            return ReplacedRows(change.indices, values[0])
        A, B = (value.to(torch.promote_types(values[0].dtype, values[1].dtype)) for value in values)
        scale = self.config.scale(change.module, A.shape[0])
        return Convolution(Factored(B.flatten(1), A.flatten(1), scale), change.shape)

    def headers(self, key: str) -> tuple[TensorHeader, ...]:
        """Return the headers of the tensors of a change."""
        change = self.changes.get(key)
        return super().headers(key) if change is None else tuple(self._file.tensors[name] for name in change.names)

    def replaces(self, key: str) -> bool:
        """Whether a change is another value of the whole tensor."""
        return key in self.changes and self.changes[key].kind == "tensor"

    def copies_of(self, key: str) -> list[str]:
        """Return the names of other tensors that are replaced by the same values, as if they were tied.

        Raises:
            InputChangedError, CheckpointError, NonFiniteError: as `load`.
        """
        if not self.replaces(key):
            return []
        change = self.changes[key]
        values = self._checked(change.names[0])
        return [
            other.weight_name for other in self.changes.values()
            if other is not change and (other.kind, other.shape) == ("tensor", change.shape)
            and torch.equal(self._checked(other.names[0]), values)
        ]  # fmt: skip

    def is_product(self, key: str) -> bool:
        """Whether a change is a product of two factors."""
        return key not in self.changes

    def _checked(self, name: str) -> Tensor:
        values = self._weights.load(name)
        check_finite(values, f"{self.path}: {name}")
        return values

    def _find_changes(self, weights: Weights, names: list[str], source: str) -> Iterator[WholeChange]:
        tensors = weights.tensors
        for name in names:
            header, own = tensors[name], name.removeprefix(PREFIX)
            if name.endswith(_MAGNITUDE):
                yield self._dora(tensors, own.removesuffix(_MAGNITUDE), source)
            elif name.endswith(_TOKENS):
                yield self._tokens(header, name, own.removesuffix(_TOKENS), source)
            elif name.endswith(LINEAR[0]) and len(header.shape) > 2:
                yield self._convolution(tensors, own.removesuffix(LINEAR[0]), source)
            elif name.endswith(BASE_LAYER) and name.removesuffix(BASE_LAYER) + LINEAR[0] not in tensors:
                continue  # `Adapter` knows it
            elif "lora_" not in own and not name.endswith(BASE_LAYER) and self.config.replaces_tensors:
                weight = own.replace(_BASE_BIAS, ".bias")
                if header.dtype not in FLOAT_DTYPES:
                    raise AdapterRefusedError(f"{source}: {own} is {header.dtype}, not floating-point")
                yield WholeChange("tensor", (name,), weight, tuple(header.shape))

    def _dora(self, tensors: Any, module: str, source: str) -> WholeChange:
        names = tuple(PREFIX + module + ending for ending in (*LINEAR, _MAGNITUDE))
        if any(name not in tensors for name in names):
            raise CheckpointError(f"{source}: {module} has magnitudes of DoRA, but lacks a factor")
        A, B, magnitude = (tuple(tensors[name].shape) for name in names)
        if len(A) != 2 or len(B) != 2 or math.prod(magnitude) != B[0]:
            raise AdapterRefusedError(
                f"{source}: DoRA of {module} has factors {A} and {B} and {magnitude} magnitudes; only matrices are "
                "supported"
            )
        turned = self.config.fan_in_fan_out
        return WholeChange("dora", names, f"{module}.weight", (A[1], B[0]) if turned else (B[0], A[1]), module)

    def _tokens(self, header: Any, name: str, module: str, source: str) -> WholeChange:
        indices = self.config.token_indices(module)
        if len(indices) != header.shape[0]:
            raise CheckpointError(f"{source}: {module} has {header.shape[0]} trained tokens, the config {len(indices)}")
        # The number of rows of the embedding is not stored; -1 stands for it.
        return WholeChange("rows", (name,), f"{module}.weight", (-1, header.shape[1]), "", indices)

    def _convolution(self, tensors: Any, module: str, source: str) -> WholeChange:
        names = PREFIX + module + LINEAR[0], PREFIX + module + LINEAR[1]
        if names[1] not in tensors:
            raise CheckpointError(f"{source}: {module} lacks the other factor")
        A, B = (tuple(tensors[name].shape) for name in names)
        if len(A) != len(B) or A[0] != B[1] or math.prod(B[2:]) != 1 or PREFIX + module + _MAGNITUDE in tensors:
            raise AdapterRefusedError(
                f"{source}: {module} has factors {A} and {B}; expected (r, in, k, ...) and (out, r, 1, ...), "
                "without DoRA"
            )
        if self.config.rank(module) != A[0]:
            raise CheckpointError(f"{source}: {module} has rank {A[0]}, the config says {self.config.rank(module)}")
        return WholeChange("convolution", names, f"{module}.weight", (B[0], *A[1:]), module)


class Rest:
    """Weights without some tensors.

    Args:
        weights: all of them.
        taken: names of those that are left out.
    """

    def __init__(self, weights: Weights, taken: set[str]) -> None:
        self.tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in taken}
        self._weights = weights

    def load(self, name: str, device: str | torch.device = "cpu", *, pin: bool = False) -> Tensor:
        """Return one tensor."""
        return self._weights.load(name, device, pin=pin)
