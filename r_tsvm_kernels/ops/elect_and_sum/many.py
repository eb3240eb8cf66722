"""Many small tensors at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_group
from . import Election, elect_and_sum


def elect_and_sum_many(
    groups: Sequence[tuple[Tensor, Sequence[Tensor]]],
    weights: Sequence[float] | float,
    *,
    elect: Election = "none",
    normalize: bool = False,
    alpha: float = 1.0,
    backend: str | None = None,
) -> list[Tensor]:
    """Merge many small tensors (norms, biases) as `elect_and_sum` would one by one, in few launches.

    Groups of equal dtypes and device are packed into one flat tensor, which costs a copy of them.

    Args:
        groups: pairs of a base and its T fine-tuned tensors, as for `elect_and_sum`.
        weights: T numbers, or one for all tasks; the same for all groups.
        elect: as for `elect_and_sum`.
        normalize: as for `elect_and_sum`.
        alpha: as for `elect_and_sum`.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        One tensor per group, in order, each with the bits of its own call of `elect_and_sum`; views of few tensors.

    Raises:
        ShapeError, DTypeError, DeviceError, ConfigError, BackendUnavailableError: as for `elect_and_sum`.
    """
    packs = defaultdict(list)
    for index, (base, tuned) in enumerate(groups):
        check_group(base, tuned, op="elect_and_sum_many")
        packs[base.device, tuple(tensor.dtype for tensor in (base, *tuned))].append(index)
    merged: dict[int, Tensor] = {}
    for pack in packs.values():
        columns = zip(*([groups[index][0], *groups[index][1]] for index in pack), strict=True)
        base, *tuned = (torch.cat([tensor.flatten() for tensor in column]) for column in columns)
        result = elect_and_sum(base, tuned, weights, elect=elect, normalize=normalize, alpha=alpha, backend=backend)
        shapes = [groups[index][0].shape for index in pack]
        parts = torch.split(result, [shape.numel() for shape in shapes])
        for index, part, shape in zip(pack, parts, shapes, strict=True):
            merged[index] = part.view(shape)
    return [merged[index] for index in range(len(groups))]
