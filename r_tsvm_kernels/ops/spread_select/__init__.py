"""Selection of the elements on which tasks differ most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import check_group, whole
from ..magnitude_select import MagnitudeSelection


@dispatch.op("Selection by magnitude", cpu=("cpu", "torch"), cuda=("triton", "torch"))
def spread_select(
    base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int], *, backend: str | None = None
) -> MagnitudeSelection:
    """Find the elements of the largest `task_spread`; among equal ones those of lowest flat index.

    ``spread_select(base, tuned, keep)`` is ``magnitude_select(spread, keep(n))`` for ``spread = task_spread(base,
    tuned)``, of which n values are not 0. On a CPU the spread is never stored. `spread_mask` makes the mask. SCE
    selects by it (Wan et al., "FuseChat", arXiv 2408.07990, section 3.3).

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        keep: called once with the number of elements on which the tasks differ; returns how many of them survive.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        The selection, with a float64 threshold.

    Raises:
        ConfigError: `keep` returned something else than a whole number from 0 to its argument.
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        NonFiniteError: a spread is NaN, because a value is NaN or infinite.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> base = torch.tensor([0.0, 1.0, 5.0])
        >>> tuned = [torch.tensor([1.0, 3.0, 5.0]), torch.tensor([3.0, 3.0, 9.0])]
        >>> selection = spread_select(base, tuned, lambda differing: differing // 2)
        >>> selection.threshold, selection.ties
        (tensor(8., dtype=torch.float64), tensor(1))
    """
    check_group(base, tuned, op="spread_select")

    def checked(differing: int) -> int:
        count = whole(keep(differing), "spread_select: what keep returns")
        if not 0 <= count <= differing:
            raise ConfigError(f"spread_select: keep must return 0 to {differing}, got {count}")
        return count

    run = dispatch.select("spread_select", base, *tuned, backend=backend)
    selection: MagnitudeSelection = run(base, tuned, checked)
    return selection
