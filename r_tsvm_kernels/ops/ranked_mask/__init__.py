"""Random masks by rank: the larger a magnitude is in its row, the likelier it survives."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_floating, check_group, check_plain
from ..elect_and_sum.ranked import check_probabilities, rank_thresholds
from ..random_mask import checked_draw


@dispatch.op("Random masks", cpu=("cpu", "torch"), cuda=("triton", "torch"), small={"BLOCK": 128})
def ranked_mask(
    x: Tensor,
    keep_probabilities: Tensor,
    *,
    seed: int,
    substream: int = 0,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw a boolean mask of `x`, or of ``x - base``; an element is True with the probability of its magnitude's rank.

    The same mask as that of `RankedSparsifier` with ``ranks = magnitude_ranks(x, base=base)``, but no ranks are
    stored: an interval that contains the rank decides most elements. DELLA without rescaling by rank (Deep et al.,
    arXiv 2406.11617, MAGPRUNE).

    Args:
        x: one dimension or more, float64, float32, float16 or bfloat16; rows run along the last, of length cols.
        keep_probabilities: of being True, by rank from the smallest magnitude to the largest; float64, shape (cols,),
            on the CPU: from `della_probabilities`.
        seed: 0 <= seed < 2**64. Element i of the flat order is True iff its word (see `random_mask`) is below
            ``round(keep_probability * 2**32)``.
        substream: 0 <= substream < 2**32; as for `random_mask`.
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32 (float64 if
            either input is float64).
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        bool tensor of the shape of `x`, contiguous.

    Raises:
        DTypeError: `x` or `base` is not floating point, or the probabilities are not float64.
        ShapeError, DeviceError: `x` has no dimension or too long rows, or the tensors do not match.
        ConfigError: a probability, `seed` or `substream` is out of range.
        NonFiniteError: a value is NaN or infinite: there is no order to rank by.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> x = torch.tensor([[0.5, -3.0, 1.0, -0.5]])
        >>> ranked_mask(x, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64), seed=0)
        tensor([[False,  True,  True, False]])
    """
    check_floating(x, "ranked_mask: x")
    check_plain(keep_probabilities, "ranked_mask: keep_probabilities")
    if keep_probabilities.dtype != torch.float64:
        raise DTypeError(f"ranked_mask: keep_probabilities must be float64, got {keep_probabilities.dtype}")
    if x.ndim == 0 or x.shape[-1] >= 2**31 or keep_probabilities.shape != x.shape[-1:]:
        raise ShapeError(
            "ranked_mask: expected one probability per column and rows of less than 2**31 elements, got "
            f"{tuple(keep_probabilities.shape)} for shape {tuple(x.shape)}"
        )
    check_probabilities(keep_probabilities, "ranked_mask")
    _, seed, substream = checked_draw(1.0, seed, substream, "ranked_mask")
    if base is not None:
        check_group(base, [x], op="ranked_mask")
    run = dispatch.select("ranked_mask", *([x] if base is None else [x, base]), backend=backend)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    mask: Tensor = run(x, base, rank_thresholds(keep_probabilities), seed, substream)
    return mask
