"""Blocks: the matrices of which one tensor consists, such as packed experts. Each is merged as a tensor of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .experts import are_experts, layer_after

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """How a tensor is divided into blocks.

    Attributes:
        packed: whether the leading dimension counts experts, each with blocks of its own.
        sizes: rows of each block of an expert; empty if an expert is one block.
        first: index of the first expert, if the tensor is a part of a larger one.

    Examples:
        >>> import torch
        >>> [label for label, _ in Blocks(packed=True, sizes=(3, 3)).of(torch.zeros(2, 6, 4))]
        ['[0, 0:3]', '[0, 3:6]', '[1, 0:3]', '[1, 3:6]']
    """

    packed: bool = False
    sizes: tuple[int, ...] = ()
    first: int = 0

    @property
    def divide(self) -> bool:
        """Whether there are several blocks, or may be."""
        return self.packed

    def shapes(self, shape: Shape) -> list[Shape]:
        """Return the shapes of the blocks of one expert."""
        _, rows, *rest = shape
        return [(size, *rest) for size in self.sizes or (rows,)]

    def largest(self, shape: Shape) -> Shape:
        """Return the shape of the largest block of a tensor of this shape; the shape itself without division."""
        return max(self.shapes(shape)) if self.divide else shape

    def count(self, shape: Shape) -> int:
        """Return the number of blocks of a tensor of this shape."""
        return shape[0] * len(self.shapes(shape)) if self.divide else 1

    def of(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Return the blocks of a tensor, as views, each with its index as text, such as ``[3]`` or ``[3, 0:64]``."""
        found = []
        for index, expert in enumerate(tensor, self.first):
            if not self.sizes:
                found.append((f"[{index}]", expert))
            start = 0
            for size in self.sizes:
                found.append((f"[{index}, {start}:{start + size}]", expert[start : start + size]))
                start += size
        return found


WHOLE = Blocks()


def blocks_of(name: str, shape: Shape, shape_of: Callable[[str], Shape | None] = lambda name: None) -> Blocks:
    """Return the blocks of a tensor.

    Packed experts are divided into experts. If the projections ``gate`` and ``up`` are stacked in one tensor, one above
    the other, as in transformers 5, each is a block: models in files mostly hold them apart. Where they are columns
    (gpt-oss, Llama 4), they stay one block.

    Args:
        name: of the tensor.
        shape: its shape.
        shape_of: returns the shape of another tensor of the same model, None if there is none.

    Examples:
        >>> blocks_of("mlp.experts.gate_up_proj", (8, 24, 16), {"mlp.experts.down_proj": (8, 16, 12)}.get)
        Blocks(packed=True, sizes=(12, 12), first=0)
    """
    if not are_experts(name, shape):
        return WHOLE
    following = layer_after(name) if len(shape) == 3 else None
    after = shape_of(following) if following else None
    stacked = after is not None and tuple(after) == (shape[0], shape[2], shape[1] // 2) and shape[1] % 2 == 0
    return Blocks(packed=True, sizes=(shape[1] // 2,) * 2 if stacked else ())
