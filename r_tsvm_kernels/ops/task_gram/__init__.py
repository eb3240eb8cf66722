"""Products of task vectors with each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import dispatch
from .._checks import check_group, check_mask


@dispatch.op(
    "Statistics of task vectors",
    cpu=("cpu", "torch"),
    cuda=("triton", "torch"),
    accuracy=1e-13,
    small={"BLOCK": 128, "STEPS": 2},
)
def task_gram(
    tuned: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the Gram matrix of the task vectors: ``G[s, t] = sum((tuned[s] - base) * (tuned[t] - base))``.

    The diagonal holds the squared norms; with the other products they give the angles. Model Stock (Jang et al., arXiv
    2403.19522), spherical means and the coefficients of SCE (Wan et al., arXiv 2408.07990) use them. Differences and
    products are formed in float64, and kernels do not store them. The order of summation depends on the shape alone.

    Args:
        tuned: T tensors of one shape and device, float64, float32, float16 or bfloat16; dtypes may differ.
        base: of the same shape and device; None for the Gram matrix of the tensors themselves.
        mask: bool, of the same shape and device: products are summed where it is True; None for everywhere.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        (T, T), float64, symmetric, on the device of the inputs. NaN and infinity reach it where the mask is True.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> base = torch.tensor([1.0, 1.0])
        >>> task_gram([torch.tensor([4.0, 5.0]), torch.tensor([1.0, 3.0])], base=base)
        tensor([[25.,  8.],
                [ 8.,  4.]], dtype=torch.float64)
    """
    check_group(base, tuned, op="task_gram", optional_base=True)
    if mask is not None:
        check_mask(mask, tuned[0], "task_gram: the mask")
    run = dispatch.select("task_gram", *([] if base is None else [base]), *tuned, backend=backend)
    gram: Tensor = run(tuned, base, mask)
    return gram
