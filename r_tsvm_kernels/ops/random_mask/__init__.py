"""Random masks that are a function of a seed and the position in the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import numbers_of, whole


@dispatch.op(cpu=("cpu", "torch"), cuda=("torch", "triton"), small={"BLOCK": 128})
def random_mask(
    shape: Sequence[int],
    keep_probability: float,
    seed: int,
    stream: int = 0,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Draw a boolean mask whose elements are True with probability `keep_probability`, independently.

    The bits of an element depend on `seed`, `stream` and its flat index alone: they are the same on every device and
    backend, for every number of threads, and whatever is drawn besides. The generator is Philox4x32-10 (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key; element i has word i % 4 of the
    counter (i // 4 as two words, low first; `stream`; 0), and is True iff that word is below
    ``round(keep_probability * 2**32)``.

    Args:
        shape: of the mask.
        keep_probability: in [0, 1]; 1 gives True everywhere, 0 False everywhere.
        seed: 0 <= seed < 2**64.
        stream: 0 <= stream < 2**32; merging uses the index of the task, so that the tasks' masks are independent.
        device: where the mask is made.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Raises:
        ConfigError: `keep_probability`, `seed` or `stream` is no number of its kind, or out of range.
        DeviceError: no implementation knows the device.
        BackendUnavailableError: `backend` cannot run here.
    """
    (keep_probability,) = numbers_of(keep_probability, 1, "random_mask: keep_probability")
    seed, stream = whole(seed, "random_mask: seed"), whole(stream, "random_mask: stream")
    check_random(keep_probability, seed, stream, op="random_mask")
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=device)
    run = dispatch.select("random_mask", mask, backend=backend)
    run(mask, mask_threshold(keep_probability), seed, stream)
    return mask


def mask_threshold(keep_probability: float) -> int:
    """Return the number that 32-bit words of True elements lie below."""
    return round(keep_probability * 2**32)


def check_random(keep_probability: float, seed: int, stream: int, op: str) -> None:
    """Raise `ConfigError` if an argument of `random_mask` is out of range."""
    if not 0.0 <= keep_probability <= 1.0:
        raise ConfigError(f"{op}: the probability of being kept must lie in [0, 1], got {keep_probability}")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"{op}: seed must lie in [0, 2**64), got {seed}")
    if not 0 <= stream < 2**32:
        raise ConfigError(f"{op}: stream must lie in [0, 2**32), got {stream}")
