"""Ranks of magnitudes within rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ShapeError
from .._checks import check_floating, check_group


@dispatch.op("Selection by magnitude", cpu=("cpu", "torch"), cuda=("cuda", "triton", "torch"), small={"LONGEST": 64})
def magnitude_ranks(x: Tensor, *, base: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Rank the magnitudes of each row of `x`, or of ``x - base``: 0 for the smallest, cols - 1 for the largest.

    A row runs along the last dimension, of length cols. Of equal magnitudes the lower index has the higher rank, so
    ``ranks >= cols - k`` selects the k largest of each row by the tie rule of `magnitude_select`. -0.0 equals 0.
    DELLA draws by these ranks (Deep et al., arXiv 2406.11617, MAGPRUNE).

    Args:
        x: one dimension or more, float64, float32, float16 or bfloat16; cols < 2**31.
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32 (float64 if
            either input is float64).
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        int32 tensor of the shape of `x`, contiguous.

    Raises:
        DTypeError: `x` or `base` is not floating point.
        ShapeError, DeviceError: `x` has no dimension or too long rows, or `x` and `base` do not match.
        NonFiniteError: a value is NaN or infinite: there is no order to rank by.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> magnitude_ranks(torch.tensor([[0.5, -3.0, 1.0, -0.5]]))
        tensor([[1, 3, 2, 0]], dtype=torch.int32)
    """
    check_floating(x, "magnitude_ranks: x")
    if x.ndim == 0 or x.shape[-1] >= 2**31:
        raise ShapeError(f"magnitude_ranks: expected rows of less than 2**31 elements, got shape {tuple(x.shape)}")
    if base is not None:
        check_group(base, [x], op="magnitude_ranks")
    run = dispatch.select("magnitude_ranks", *([x] if base is None else [x, base]), backend=backend)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.int32, device=x.device)
    ranks: Tensor = run(x, base)
    return ranks
