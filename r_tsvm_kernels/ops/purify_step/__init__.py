"""A step of a purification, and what the next one does: one product and a few numbers, without a wait."""

from __future__ import annotations

from typing import cast

import torch

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_apart
from .._planes import Planes, check_planes
from .._steering import Steering, first_steering

__all__ = ["Steering", "first_steering", "purify_step"]


@dispatch.op("Products for tensor cores", cuda=("triton", "cublas", "torch"), accuracy=1e-6)
def purify_step(
    planes: Planes, steering: Steering, *, out: Planes | None = None, backend: str | None = None
) -> tuple[Planes, Steering]:
    """Return ``X X`` or ``2 X - X X`` of each symmetric X, as `steering` says, and the steering of the next step.

    Trace-correcting purification (Niklasson, Phys. Rev. B 66, 155115). Everything stays in device memory, so a loop of
    steps never waits, and takes two launches for each. Accuracy as `symm_square`.

    Args:
        planes: (B, n, n), exactly symmetric. The factors in `steering` are those of X without its scale; matrices that
            are done have scale 1.
        steering: of this step, float32, from `first_steering` or an earlier step.
        out: planes of an earlier step whose memory is used again; they hold matrices that are done already.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        The matrices as planes of scale 1, and the steering of the next step.

    Raises:
        ShapeError, DTypeError, DeviceError: not square planes, or a steering that does not fit them.
        ConfigError: `out` shares memory with `planes`.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        Towards the projector on the larger eigenvalue:

        >>> from r_tsvm_kernels.ops import first_steering, purify_step, split_planes
        >>> X, one = torch.tensor([[[0.5, 0.0], [0.0, 1.0]]]), torch.ones(1)
        >>> steering = first_steering(1.5 * one, 1.25 * one, one, [(0.1 * one, 0.1 * one)], 1)
        >>> purify_step(split_planes(X), steering)[0].dense()
        tensor([[[0.2500, 0.0000],
                 [0.0000, 1.0000]]])
    """
    check_planes("purify_step", planes)
    if len(planes.shape) != 3 or planes.shape[-2] != planes.shape[-1]:
        raise ShapeError(f"purify_step: expected a batch of square matrices, got shape {tuple(planes.shape)}")
    count = planes.shape[0]
    if steering.values.shape != (6, count) or steering.counts.shape != (2, count):
        raise ShapeError(f"purify_step: expected the steering of {count} matrices, got {tuple(steering.values.shape)}")
    if steering.limits.shape[1:] != (2, count):
        raise ShapeError(f"purify_step: expected the limits of {count} matrices, got {tuple(steering.limits.shape)}")
    found = (steering.values.dtype, steering.limits.dtype, steering.counts.dtype)
    if found != (torch.float32, torch.float32, torch.int32):
        raise DTypeError(f"purify_step: a steering is float32 and int32, got {found}")
    if out is not None:
        if out.shape != planes.shape:
            raise ShapeError(f"purify_step: out has shape {tuple(out.shape)}, the matrices {tuple(planes.shape)}")
        check_planes("purify_step", planes, out)
        parts = {f"{name}.{part}": getattr(x, part) for name, x in {"planes": planes, "out": out}.items()
                 for part in ("hi", "lo")}  # fmt: skip
        check_apart({name: part for name, part in parts.items() if part is not None}, op="purify_step")
    run = dispatch.select("purify_step", planes.hi, backend=backend)
    return cast(tuple[Planes, Steering], run(planes, steering, out))
