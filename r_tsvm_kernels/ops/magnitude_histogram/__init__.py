"""Counts of the digits of magnitudes: the step from which exact selection in bounded memory is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import accumulation_dtype, check_floating, check_group, whole

MAX_BITS = 11  # of a digit: 2048 counters fit into the shared memory of a GPU
# Of the bit pattern of a magnitude: that of the float without its sign. As integers the patterns have the order of the
# magnitudes.
PATTERN_BITS = {torch.float32: 31, torch.float64: 63}


def magnitude_histogram(
    x: Tensor,
    bits: int,
    *,
    prefix: int = 0,
    prefix_bits: int = 0,
    base: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Count how the bit patterns of the magnitudes of `x`, or of ``x - base``, go on after a prefix.

    The pattern of a magnitude is that of its float32 without the sign, 31 bits (float64, 63 bits, if either input is
    float64); 16-bit floats are widened first, which is exact. -0.0 counts as 0; infinity and NaN are counted where
    their bits belong. On a GPU nothing waits for the device.

    Args:
        x: any shape, float64, float32, float16 or bfloat16.
        bits: length of the digit that is counted, from 1 to 11.
        prefix: of the patterns whose first `prefix_bits` bits are this number, 0 <= prefix < 2**prefix_bits.
        prefix_bits: prefix_bits + bits <= 31 (63 for float64).
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32, or float64.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        int64 tensor of 2**bits counts on the device of `x`: entry d is the number of elements whose pattern begins
        with the prefix and continues with the `bits` bits of d.

    Raises:
        ConfigError: `bits`, `prefix` or `prefix_bits` is out of range.
        DTypeError: `x` or `base` is not floating point.
        ShapeError, DeviceError: `x` and `base` do not match.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_floating(x, "magnitude_histogram: x")
    bits, prefix = whole(bits, "magnitude_histogram: bits"), whole(prefix, "magnitude_histogram: prefix")
    prefix_bits = whole(prefix_bits, "magnitude_histogram: prefix_bits")
    if base is not None:
        check_group(base, [x], op="magnitude_histogram")
    tensors = [x] if base is None else [x, base]
    total = PATTERN_BITS[accumulation_dtype(*tensors)]
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"magnitude_histogram: bits must lie in [1, {MAX_BITS}], got {bits}")
    if not 0 <= prefix_bits <= total - bits:
        raise ConfigError(f"magnitude_histogram: prefix_bits must lie in [0, {total - bits}], got {prefix_bits}")
    if not 0 <= prefix < 1 << prefix_bits:
        raise ConfigError(f"magnitude_histogram: prefix must lie in [0, 2**{prefix_bits}), got {prefix}")
    run = dispatch.select("magnitude_histogram", *tensors, backend=backend)
    counts: Tensor = run(x, bits, prefix, total - prefix_bits - bits, base)
    return counts
