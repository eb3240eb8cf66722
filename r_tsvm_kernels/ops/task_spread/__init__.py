"""How far apart the tasks are, element by element."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import dispatch
from .._checks import check_group


@dispatch.op("Statistics of task vectors", cpu=("cpu", "torch"), cuda=("triton", "torch"), small={"BLOCK": 128})
def task_spread(base: Tensor, tuned: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Return ``sum over t of (D_t - mean)^2`` for each element, ``D_t = tuned[t] - base``: T times the variance.

    SCE selects by it (Wan et al., "FuseChat", arXiv 2408.07990, section 3.3). Task vectors are formed in float32
    (float64 if any input is float64); their mean and the sum, over the tasks from first to last, in float64.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        A new tensor of the base's shape, float64, >= 0. NaN and infinity of an element make it NaN there.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> base = torch.tensor([0.0, 1.0])
        >>> task_spread(base, [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])])
        tensor([2., 0.], dtype=torch.float64)
    """
    check_group(base, tuned, op="task_spread")
    run = dispatch.select("task_spread", base, *tuned, backend=backend)
    spread: Tensor = run(base, tuned)
    return spread
