"""Random masks that are a function of a seed and the position in the tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import numbers_of, whole


@dispatch.op("Random masks", cpu=("cpu", "torch"), cuda=("triton", "torch"), small={"BLOCK": 128})
def random_mask(
    shape: Sequence[int],
    keep_probability: float,
    *,
    seed: int,
    substream: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw a boolean mask whose elements are True with probability `keep_probability`, independently.

    An element depends on `seed`, `substream` and its flat index alone: it is the same on every device and backend, for
    every number of threads, and whatever else is drawn. The generator is Philox4x32-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011) with the seed as key. Element i has word i % 4 of the counter (i // 4 as two
    words, low first; `substream`; 0), and is True iff that word is below ``round(keep_probability * 2**32)``.

    Args:
        shape: of the mask; its flat index counts in row-major order.
        keep_probability: in [0, 1]; 1 gives True everywhere, 0 False everywhere.
        seed: 0 <= seed < 2**64.
        substream: 0 <= substream < 2**32. Masks of different substreams are independent: merging takes the index of the
            task. Not a CUDA stream.
        device: of the mask; None for torch's default device.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        bool tensor of that shape, contiguous, on `device`.

    Raises:
        ConfigError: `shape` is no shape; or `keep_probability`, `seed` or `substream` is not such a number, or out of
            range.
        DeviceError: no implementation supports the device.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> random_mask((2, 4), 0.5, seed=1)
        tensor([[False, False, False, False],
                [False, False,  True, False]])
    """
    keep_probability, seed, substream = checked_draw(keep_probability, seed, substream, "random_mask")
    sizes = [whole(size, "random_mask: a size") for size in shape] if isinstance(shape, Iterable) else [-1]
    if min(sizes, default=0) < 0:
        raise ConfigError(f"random_mask: shape: expected sizes of at least 0, such as (3, 4), got {shape!r}")
    mask = torch.empty(sizes, dtype=torch.bool, device=device)
    run = dispatch.select("random_mask", mask, backend=backend)
    run(mask, mask_threshold(keep_probability), seed, substream)
    return mask


def mask_threshold(keep_probability: float) -> int:
    """Return the number below which the 32-bit words of True elements are."""
    return round(keep_probability * 2**32)


def checked_draw(keep_probability: Any, seed: Any, substream: Any, label: str) -> tuple[float, int, int]:
    """Return the arguments of `random_mask` as Python numbers; raise `ConfigError` if one is out of range."""
    (probability,) = numbers_of(keep_probability, 1, f"{label}: keep_probability")
    if not 0.0 <= probability <= 1.0:
        raise ConfigError(f"{label}: keep_probability must be in [0, 1], got {probability}")
    seed, substream = whole(seed, f"{label}: seed"), whole(substream, f"{label}: substream")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"{label}: seed must be in [0, 2**64), got {seed}")
    if not 0 <= substream < 2**32:
        raise ConfigError(f"{label}: substream must be in [0, 2**32), got {substream}")
    return probability, seed, substream
