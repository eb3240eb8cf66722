"""Random masks by rank: the larger a magnitude is in its row, the likelier it survives."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_floating, check_group, check_plain, whole
from ..elect_and_sum.ranked import check_probabilities, rank_thresholds
from ..random_mask import check_random


@dispatch.op(cpu=("cpu", "torch"), cuda=("torch", "triton"), small={"BLOCK": 128})
def ranked_mask(
    x: Tensor,
    probabilities: Tensor,
    seed: int,
    stream: int = 0,
    *,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw a boolean mask of `x`, or of ``x - base``; an element is True with the probability of its magnitude's rank.

    The same mask as that of `RankedSparsifier` with ``ranks = magnitude_ranks(x, base=base)``, without storing ranks:
    most elements are decided by an interval in which their rank lies. DELLA without rescaling by rank (Deep et al.,
    arXiv 2406.11617, MAGPRUNE).

    Args:
        x: one dimension or more, float64, float32, float16 or bfloat16; rows run along the last, of length cols.
        probabilities: of being True, by rank from the smallest magnitude to the largest; float64, shape (cols,), on the
            CPU: from `della_probabilities`.
        seed: 0 <= seed < 2**64; element i of the flat order is True iff its word (see `random_mask`) is below
            ``round(probability * 2**32)``.
        stream: 0 <= stream < 2**32.
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32 (float64 if
            either input is float64).
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        bool tensor of the shape of `x`, contiguous.

    Raises:
        DTypeError: `x` or `base` is not floating point, or the probabilities are not float64.
        ShapeError, DeviceError: `x` has no dimension or too long rows, or the tensors do not match.
        ConfigError: a probability, `seed` or `stream` is out of range.
        NonFiniteError: a value is NaN or infinite: there is no order to rank by.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_floating(x, "ranked_mask: x")
    check_plain(probabilities, "ranked_mask: probabilities")
    if probabilities.dtype != torch.float64:
        raise DTypeError(f"ranked_mask: expected float64 probabilities, got {probabilities.dtype}")
    if x.ndim == 0 or x.shape[-1] >= 2**31 or probabilities.shape != x.shape[-1:]:
        raise ShapeError(
            "ranked_mask: expected one probability per column and rows of less than 2**31 elements, got "
            f"{tuple(probabilities.shape)} for shape {tuple(x.shape)}"
        )
    check_probabilities(probabilities, op="ranked_mask")
    seed, stream = whole(seed, "ranked_mask: seed"), whole(stream, "ranked_mask: stream")
    check_random(1.0, seed, stream, op="ranked_mask")
    if base is not None:
        check_group(base, [x], op="ranked_mask")
    run = dispatch.select("ranked_mask", *([x] if base is None else [x, base]), backend=backend)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    mask: Tensor = run(x, base, rank_thresholds(probabilities), seed, stream)
    return mask
