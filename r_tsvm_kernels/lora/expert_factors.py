"""Adapters of packed experts: PEFT's `target_parameters`, one pair of factors for the matrices of all experts.

Other parameters, such as a router's (out, in), count as one expert.

For E experts and rank r, PEFT stores A as (E r, in), in blocks of r rows, and B as (out, r E), whose columns alternate
between the experts. If two parameters of a module are adapted, the factors of one are named as those of a layer inside
that of the other (`base_layer`); shapes tell which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import TensorHeader
from ..errors import AdapterRefusedError, CheckpointError
from ..experts import layer_after
from ..ops._checks import accumulation_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertUpdate:
    """``scale * B_e @ A_e`` for each expert e, added to a packed tensor.

    Attributes:
        A: (E r, in).
        B: (out, r E).
        scale: factor of the products.
        experts: E.
        transposed: whether a matrix is stored as (in, out).
    """

    A: Tensor
    B: Tensor
    scale: float
    experts: int
    transposed: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.B, self.A

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExpertUpdate:
        """Return it on a device."""
        A, B = (factor.to(device, non_blocking=non_blocking) for factor in (self.A, self.B))
        return ExpertUpdate(A, B, self.scale, self.experts, self.transposed)

    def applied(self, base: Tensor) -> Tensor:
        """Return the base plus the updates."""
        dtype = accumulation_dtype(base, self.A, self.B)
        tuned = base.to(dtype, copy=True)
        A = self.A.to(dtype).view(self.experts, -1, self.A.shape[1])
        B = self.B.to(dtype).view(self.B.shape[0], -1, self.experts)
        for expert, own in enumerate(tuned.view(self.experts, *tuned.shape[-2:])):
            matrix = own.mT if self.transposed else own
            matrix.addmm_(B[:, :, expert], A[expert], alpha=self.scale)
        return tuned


@dataclass(frozen=True)
class Target:
    """A tensor that a pair of factors changes.

    Attributes:
        names: of the factors in the adapter, A first.
        module: that the tensor belongs to.
        weight_name: of the tensor in the base model.
        shape: (E, m, n), or (m, n).
        transposed: whether a matrix is stored as (in, out).
    """

    names: tuple[str, str]
    module: str
    weight_name: str
    shape: Shape
    transposed: bool


def module_of(module: str, targets: Sequence[str]) -> str | None:
    """Return the module whose bare parameters are adapted under this name; None if there are none.

    Examples:
        >>> module_of("layers.0.mlp.experts.base_layer", ["mlp.experts.gate_up_proj"])
        'layers.0.mlp.experts'
    """
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    owners = (target.rpartition(".")[0] for target in targets)
    return module if any(f".{module}".endswith(f".{owner}") for owner in owners) else None


def find_targets(
    pairs: Mapping[str, list[tuple[str, str]]],
    factors: Mapping[str, TensorHeader],
    targets: Sequence[str],
    base: Mapping[str, TensorHeader],
    source: str,
) -> list[Target]:
    """Find the tensor of the base that each pair of factors changes.

    Args:
        pairs: names of A and B, by module.
        factors: headers of the adapter.
        targets: the setting `target_parameters`.
        base: headers of the base.
        source: of the adapter, for messages.

    Raises:
        CheckpointError: the base has no such tensor.
        AdapterRefusedError: several tensors fit.
    """
    found = []
    for module, own in pairs.items():
        shapes = {
            name: header.shape
            for name, header in base.items()
            if len(header.shape) in (2, 3)
            and _belongs(name, module)
            and any(f".{name}".endswith(f".{target}") for target in targets)
        }
        if not shapes:
            raise CheckpointError(
                f"{source}: adapts bare parameters of {module}, of which the base has none; if it stores its experts "
                "one by one, merge the adapter into its model with PEFT (merge_and_unload) first"
            )
        for names in own:
            sizes = factors[names[0]].shape[1], factors[names[1]].shape[0]  # in, out
            fitting = [name for name, shape in shapes.items() if _fits(sizes, shape)]
            if len(fitting) != 1:
                what = "several tensors fit" if fitting else "no tensor fits"
                raise AdapterRefusedError(
                    f"{source}: {names[0]} is of {sizes[0]} inputs and {sizes[1]} outputs: {what}"
                )
            name = fitting[0]
            shape = shapes.pop(name)
            experts = shape[0] if len(shape) == 3 else 1
            if factors[names[0]].shape[0] % experts or factors[names[0]].shape[0] != factors[names[1]].shape[1]:
                raise AdapterRefusedError(f"{source}: {names[0]} has no equal ranks for {experts} experts")
            packed = len(shape) == 3 and sizes == shape[1:]
            turned = packed and (shape[1] != shape[2] or _are_transposed(name, base))
            found.append(Target(names, module, name, shape, turned))
    return found


def _fits(sizes: Shape, shape: Shape) -> bool:
    """Whether inputs and outputs are those of a matrix (out, in), or of packed ones in either orientation."""
    return sizes == shape[-1:-3:-1] or (len(shape) == 3 and sizes == shape[1:])


def _belongs(name: str, module: str) -> bool:
    """Whether a tensor is a parameter of a module; one of the two names may have a prefix of the model class."""
    owner = name.rpartition(".")[0]
    return owner == module or owner.endswith(f".{module}") or module.endswith(f".{owner}")


def _are_transposed(name: str, base: Mapping[str, TensorHeader]) -> bool:
    """Whether the experts beside a square one are stored (in, out): gate and up lie side by side, not stacked."""
    owner = name.rpartition(".")[0]
    fused = next((x for x in base if x.rpartition(".")[0] == owner and layer_after(x) in base), None)
    if fused is None:
        raise AdapterRefusedError(f"{name}: square experts, whose orientation nothing shows")
    following = layer_after(fused)
    assert following is not None
    return base[fused].shape[2] == 2 * base[following].shape[1]
