"""The mask of the elements on which tasks differ most."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import dispatch
from .._checks import check_group
from ..magnitude_select import MagnitudeSelection


@dispatch.op("Selection by magnitude", cpu=("cpu", "torch"), cuda=("triton", "torch"))
def spread_mask(
    base: Tensor, tuned: Sequence[Tensor], selection: MagnitudeSelection, *, backend: str | None = None
) -> Tensor:
    """Return ``selection.mask(task_spread(base, tuned))``; on a CPU the spread is never stored.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        selection: what `spread_select` found.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        A new boolean tensor of the base's shape. Elements whose spread is NaN are not selected.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> from r_tsvm_kernels.ops import spread_select
        >>> base = torch.tensor([0.0, 1.0, 5.0])
        >>> tuned = [torch.tensor([1.0, 3.0, 5.0]), torch.tensor([3.0, 3.0, 9.0])]
        >>> spread_mask(base, tuned, spread_select(base, tuned, lambda differing: differing // 2))
        tensor([False, False,  True])
    """
    check_group(base, tuned, op="spread_mask")
    run = dispatch.select("spread_mask", base, *tuned, backend=backend)
    mask: Tensor = run(base, tuned, selection)
    return mask
