"""Statistics of the magnitudes of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import check_group, plain_values


@dataclass(frozen=True, repr=False)
class TaskStatistics:
    """Statistics of ``a = |tuned[t] - base|``, one entry per task; tensors of shape (T,) on the inputs' device.

    Attributes:
        numel: elements in each task vector.
        mean: mean of a, float64, in weight units.
        sd: population standard deviation of a, float64, in weight units.
        max: largest a, float64, in weight units.
        zeros: number of elements with a == 0, int64.
        theta: outlier threshold ``mean + sigma * sd``, float64, in weight units.
        outlier_mass: ``sum(a[a > theta]) / sum(a)``, float64, in [0, 1]; 0 where sum(a) is 0.
        small: number of elements with ``a <= eps * mean``, int64; zeros are included.
    """

    numel: int
    mean: Tensor
    sd: Tensor
    max: Tensor
    zeros: Tensor
    theta: Tensor
    outlier_mass: Tensor
    small: Tensor

    def __repr__(self) -> str:
        return f"TaskStatistics(tasks {len(self.mean)}, numel {self.numel}, on {self.mean.device})"


@dispatch.op(
    "Statistics of task vectors",
    cpu=("cpu", "torch"),
    cuda=("triton", "torch"),
    accuracy=1e-12,
    small={"BLOCK": 128},
)
def task_statistics(
    base: Tensor, tuned: Sequence[Tensor], *, sigma: float = 3.0, eps: float = 0.1, backend: str | None = None
) -> TaskStatistics:
    """Measure the magnitudes of the task vectors ``tuned[t] - base``.

    Forms task vectors in float32 (float64 if any input is float64); the kernels never store them. Accumulates every
    sum in float64, in an order that depends on the shape alone. R-TSVM's outlier weighting and sparsity are functions
    of these numbers (Yang et al., arXiv 2502.06876; the formulas are our reconstruction).

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        sigma: standard deviations above the mean at which outliers begin, >= 0; infinity means no outliers.
        eps: an element counts as small up to this multiple of the mean magnitude, >= 0.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        TaskStatistics. Empty tensors give zeros everywhere. NaN or infinity in a task makes its statistics NaN or
        infinite, and is no error here.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        ConfigError: `sigma` or `eps` is not a number, negative or NaN.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> import torch
        >>> statistics = task_statistics(torch.zeros(4), [torch.tensor([0.0, -1.0, 1.0, 6.0])], sigma=1.0)
        >>> statistics.mean.item(), statistics.zeros.item(), statistics.outlier_mass.item()
        (2.0, 1, 0.75)
    """
    check_group(base, tuned, op="task_statistics")
    sigma, eps = given = [plain_values(sigma), plain_values(eps)]
    if not all(isinstance(value, int | float) and value >= 0 for value in given):
        raise ConfigError(f"task_statistics: sigma and eps must be >= 0, got sigma={sigma}, eps={eps}")
    run = dispatch.select("task_statistics", base, *tuned, backend=backend)
    result: TaskStatistics = run(base, tuned, sigma, eps)
    return result
