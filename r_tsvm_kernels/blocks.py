"""Blocks: the matrices of which one tensor consists. Each is merged as a tensor of its own.

Packed experts (E, m, n) are E matrices, fused projections are several matrices in one, and the weight of a convolution
(out, in, k, ...) is a matrix (out, in * k * ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from .errors import ConfigError
from .experts import are_experts, layer_after

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """How a tensor is divided into blocks.

    Attributes:
        packed: whether the leading dimension counts experts, each with blocks of its own.
        axis: dimension along which the blocks lie, in an expert or in a tensor that is not packed.
        sizes: size of each block along it; empty if there is one block.
        flat: whether all dimensions but the first are one.
        first: index of the first expert, if the tensor is a part of a larger one.

    Examples:
        >>> import torch
        >>> [label for label, _ in Blocks(packed=True, sizes=(3, 3)).of(torch.zeros(2, 6, 4))]
        ['[0, 0:3]', '[0, 3:6]', '[1, 0:3]', '[1, 3:6]']
    """

    packed: bool = False
    axis: int = 0
    sizes: tuple[int, ...] = ()
    flat: bool = False
    first: int = 0

    @property
    def divide(self) -> bool:
        """Whether the tensor is not merged as it is."""
        return self.packed or self.flat or len(self.sizes) > 1

    def shapes(self, shape: Shape) -> list[Shape]:
        """Return the shapes of the blocks, of one expert if they are packed."""
        own = shape[1:] if self.packed else shape
        if self.flat:
            own = (own[0], math.prod(own[1:]))
        return [(*own[: self.axis], size, *own[self.axis + 1 :]) for size in self.sizes or (own[self.axis],)]

    def largest(self, shape: Shape) -> Shape:
        """Return the shape of the largest block of a tensor of this shape; the shape itself without division."""
        return max(self.shapes(shape), key=math.prod) if self.divide else shape

    def count(self, shape: Shape) -> int:
        """Return the number of blocks of a tensor of this shape."""
        if not self.divide:
            return 1
        return len(self.shapes(shape)) * (shape[0] if self.packed else 1)

    def ranges(self) -> list[tuple[int, int]]:
        """Return start and size of each of several blocks along their dimension."""
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        return list(zip(starts, self.sizes, strict=True))

    def of(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Return the blocks of a tensor, each with its index as text, such as ``[3]`` or ``[3, 0:64]``.

        They are views, except for flat blocks of a tensor that is not contiguous.
        """
        whole = tensor.flatten(1) if self.flat else tensor
        if self.flat and not self.sizes:
            return [("", whole)]
        found = []
        for index, own in enumerate(whole, self.first) if self.packed else [(None, whole)]:
            before = ([] if index is None else [str(index)]) + [":"] * self.axis
            if not self.sizes:
                found.append((f"[{index}]", own))
            for start, size in self.ranges():
                label = ", ".join([*before, f"{start}:{start + size}"])
                found.append((f"[{label}]", own.narrow(self.axis, start, size)))
        return found


WHOLE = Blocks()


def blocks_of(
    name: str,
    shape: Shape,
    shape_of: Callable[[str], Shape | None] = lambda name: None,
    *,
    split: Mapping[str, Shape] | None = None,
    flatten: bool = False,
) -> Blocks:
    """Return the blocks of a tensor.

    Packed experts are divided into experts. If the projections ``gate`` and ``up`` are stacked in one tensor, one above
    the other, as in transformers 5, each is a block: models in files mostly hold them apart. Where they are columns
    (gpt-oss, Llama 4), they stay one block.

    Args:
        name: of the tensor.
        shape: its shape.
        shape_of: returns the shape of another tensor of the same model, None if there is none.
        split: sizes of the blocks of fused tensors, by patterns of names.
        flatten: whether weights of convolutions are taken as matrices.

    Raises:
        ConfigError: the sizes in `split` sum to neither the rows nor the columns.

    Examples:
        >>> blocks_of("mlp.experts.gate_up_proj", (8, 24, 16), {"mlp.experts.down_proj": (8, 16, 12)}.get)
        Blocks(packed=True, axis=0, sizes=(12, 12), flat=False, first=0)
        >>> blocks_of("attn.qkv_proj.weight", (24, 16), split={"*qkv_proj*": (16, 4, 4)}).shapes((24, 16))
        [(16, 16), (4, 16), (4, 16)]
    """
    packed = are_experts(name, shape)
    own = shape[1:] if packed else shape
    sizes = next((sizes for pattern, sizes in (split or {}).items() if fnmatchcase(name, pattern)), None)
    if sizes is not None and own:
        axis, flat = _axis(name, own, sizes), flatten and is_convolution(name, shape)
        columns = math.prod(own[2:]) if flat and axis == 1 else 1  # of the matrix, for each input channel
        return Blocks(packed=packed, axis=axis, sizes=tuple(size * columns for size in sizes), flat=flat)
    if not packed:
        return Blocks(flat=True) if flatten and is_convolution(name, shape) else WHOLE
    following = layer_after(name) if len(shape) == 3 else None
    after = shape_of(following) if following else None
    stacked = after is not None and tuple(after) == (shape[0], shape[2], shape[1] // 2) and shape[1] % 2 == 0
    return Blocks(packed=True, sizes=(shape[1] // 2,) * 2 if stacked else ())


def is_convolution(name: str, shape: Shape) -> bool:
    """Whether a tensor is the weight of a convolution over several channels, (out, in, k, ...).

    A depthwise convolution, with one channel for each filter, is no matrix that maps channels to channels.

    Examples:
        >>> [is_convolution("conv.weight", shape) for shape in ((64, 32, 3, 3), (64, 1, 4), (64, 32))]
        [True, False, False]
    """
    channels = len(shape) in (3, 4, 5) and min(shape[:2]) > 1
    return channels and name.rpartition(".")[2] in ("", "weight") and not are_experts(name, shape)


def _axis(name: str, shape: Shape, sizes: Shape) -> int:
    """Return the dimension that the sizes divide: rows, or else columns, as layers hold that multiply from the left."""
    for axis, size in enumerate(shape[:2]):
        if size == sum(sizes):
            return axis
    found = " x ".join(map(str, shape))
    raise ConfigError(
        f"split: {name} is {found}, and the sizes {list(sizes)} sum to {sum(sizes)}; give sizes that sum to its rows, "
        "or to its columns if they are the outputs"
    )
