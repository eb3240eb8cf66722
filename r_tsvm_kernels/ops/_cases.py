"""Cases: inputs that exercise the hard paths of an op, on which each backend is compared with the reference.

Each op lists its own in `ops/<op>/cases.py`. Nothing here is imported until a comparison runs. `WIDTHS` there gives the
bytes that a thread of each Triton kernel of the op reads and writes at once, at least, if sizes are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Op
from ._checks import FLOAT_DTYPES
from ._planes import Planes

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# dtype of the base, dtype of what is compared with it
MIXES = [(dtype, dtype) for dtype in FLOAT_DTYPES] + [
    (BFLOAT16, FLOAT32), (FLOAT32, FLOAT16), (FLOAT16, BFLOAT16), (BFLOAT16, FLOAT64), (FLOAT64, FLOAT16),
]  # fmt: skip
# Nothing, one element, one row, one column, around a power of two, odd, several blocks of a kernel.
SHAPES = [(0,), (3, 0), (), (1,), (1, 1), (1, 131), (131, 1), (128,), (129,), (2, 3, 43), (17, 31), (601,)]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        label: what is hard about it.
        args: positional arguments; tensors are on the device that was asked for.
        options: keyword arguments.
        raises: the error that the call must raise in place of a result; None for a result.
        compiled: whether the kernels that it launches are compiled for every GPU and checked for spills.
    """

    label: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    raises: type[Exception] | None = None
    compiled: bool = False


def leaves(result: object) -> Iterator[Tensor]:
    """Yield the tensors of a result of whatever form, pairs of planes as the matrices that they stand for."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Planes):
        yield from [result.hi, result.scale] if result.lo is None else [result.dense()]
    elif isinstance(result, list | tuple):
        for item in result:
            yield from leaves(item)
    elif is_dataclass(result):
        for part in fields(result):
            yield from leaves(getattr(result, part.name))


def difference(op: Op[..., Any], got: object, expected: object) -> str | None:
    """Say how a result differs from the reference's by more than the op allows; None if it does not.

    An op without `accuracy` must give the same bits. For others the distance of each floating-point tensor, relative
    to the largest element, is at most the accuracy, or one rounding of the coarsest dtype of the result if that is
    more; integers and booleans are the same, and so are NaN and infinity.
    """
    mine, theirs = list(leaves(got)), list(leaves(expected))
    if len(mine) != len(theirs):
        return f"{len(mine)} tensors, expected {len(theirs)}"
    coarsest = max((torch.finfo(x.dtype).eps for x in theirs if x.is_floating_point()), default=0.0)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"tensor {index}: {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}"
        if op.accuracy is None or not a.is_floating_point():
            if not same_bits(a, b):
                return f"tensor {index}: {int((_bytes(a) != _bytes(b)).sum())} bytes differ from the reference's"
        else:
            error, allowed = _distance(a, b), max(op.accuracy, coarsest)
            if error > allowed:
                return f"tensor {index}: relative error {error:.1e}, expected at most {allowed:.1e}"
    return None


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of arguments, as they are stored: of planes each."""
    yield from (part for part in parts_of(value) if isinstance(part, Tensor))


def parts_of(value: object) -> Iterator[object]:
    """Yield the tensors, numbers and words of arguments."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts_of(item)
    elif isinstance(value, dict):
        yield from parts_of(list(value.values()))
    elif is_dataclass(value):
        yield from parts_of([getattr(value, part.name) for part in fields(value)])
    else:
        yield value


def distance(got: object, expected: object) -> float:
    """Return the largest distance of a floating-point tensor from the reference's, relative to its largest element.

    Infinity if the tensors differ in number, shape or dtype, or in where they are finite.
    """
    mine, theirs = list(leaves(got)), list(leaves(expected))
    if [(x.dtype, x.shape) for x in mine] != [(x.dtype, x.shape) for x in theirs]:
        return float("inf")
    return max((_distance(a, b) for a, b in zip(mine, theirs, strict=True) if b.is_floating_point()), default=0.0)


def _bytes(x: Tensor) -> Tensor:
    # A copy: one element may have any stride and still be contiguous.
    return x.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether tensors have the same bits. NaN is NaN, whatever its payload, which is up to the processor."""
    if a.is_floating_point() and b.isnan().any():
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(_bytes(a.nan_to_num(7.0)), _bytes(b.nan_to_num(7.0)))
    return torch.equal(_bytes(a), _bytes(b))


def _distance(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    finite = b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
        return float("inf")
    a, b = (torch.where(finite, x, 0).double() for x in (a, b))
    largest = float(b.abs().max())
    error = float((a - b).abs().max())
    return error / largest if largest else error


# --- inputs


def seeded(device: torch.device | str) -> torch.Generator:
    """Return a generator with a fixed seed: cases are the same each time."""
    return torch.Generator(device).manual_seed(20250211)


def normal(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Return standard normal values, float64."""
    return torch.randn(tuple(shape), generator=random, dtype=FLOAT64, device=random.device)


def group(
    shape: Sequence[int], dtypes: Sequence[torch.dtype], random: torch.Generator, scale: float = 0.05
) -> tuple[Tensor, list[Tensor]]:
    """Return a base and one fine-tuned tensor near it for each further dtype."""
    base = normal(shape, random)
    return base.to(dtypes[0]), [(base + scale * normal(shape, random)).to(dtype) for dtype in dtypes[1:]]


def groups(device: torch.device | str, tasks: int = 3) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield labelled groups: shapes, dtypes and mixes of dtypes, layouts, kinds of values; all are finite."""
    random = seeded(device)
    for shape in SHAPES:
        yield (f"shape {shape}", *group(shape, [FLOAT32] * (tasks + 1), random))
    for first, second in MIXES:
        dtypes = [first, *([second, first] * tasks)[:tasks]]
        name = f"{first} with {second}".replace("torch.", "")
        yield (name, *group((263,), dtypes, random))
    for layout, change in LAYOUTS.items():
        base, tuned = group((19, 27), [BFLOAT16, *[FLOAT32] * tasks], random)
        yield f"{layout} base", change(base), tuned
        yield f"{layout} models", base, [change(tensor) for tensor in tuned]
    for dtype in FLOAT_DTYPES:
        for name, x in hard_values(dtype, random):
            others = [x.flip(0), -x, x.roll(3)]
            yield f"{name}, {dtype}".replace("torch.", ""), torch.zeros_like(x), [x, *others][:tasks]


def hard_values(dtype: torch.dtype, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield labelled vectors that are hard to select from, to sum or to round; all are finite."""
    device, info = random.device, torch.finfo(dtype)
    tiny = {FLOAT64: 2.0**-1074, FLOAT32: 2.0**-149, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-133}[dtype]

    def steps(first: int, last: int) -> Tensor:
        return torch.arange(first, last, dtype=FLOAT64, device=device)

    whole = torch.randint(-3, 4, (200,), generator=random, device=device)
    yield "all equal", torch.full((131,), -0.3, dtype=dtype, device=device)
    yield "all zero", torch.zeros(70, dtype=dtype, device=device)
    yield "zeros of both signs", torch.tensor([0.0, -0.0, 1.0, -0.0] * 40, dtype=dtype, device=device)
    yield "ties", whole.to(dtype)
    yield "subnormal", (steps(-90, 90) * tiny).to(dtype)
    yield "largest", torch.tensor([info.max, -info.max, 1.0, tiny, 0.0], dtype=dtype, device=device)
    yield "neighbours", (1 + steps(0, 300) % 7 * info.eps).to(dtype)
    yield "wide", (normal((150,), random) * 10.0 ** (steps(0, 150) % 8 - 4)).to(dtype)
    yield "mostly zero", (normal((300,), random) * (steps(0, 300) % 10 == 0)).to(dtype)
    yield "one", torch.tensor([-2.0], dtype=dtype, device=device)


def around_ties(wide: torch.dtype, narrow: torch.dtype, device: torch.device | str) -> Tensor:
    """Return values that are hard to round: ties between two of `narrow`, its subnormals, and beyond its range."""
    limits = torch.finfo(narrow)
    places = torch.arange(-80, 81, dtype=FLOAT64, device=device) / 8
    scales = [limits.smallest_normal * limits.eps, limits.smallest_normal, limits.eps, 1.0, limits.max / 11]
    steps = torch.cat([scale * places for scale in scales] + [limits.max * (1 + limits.eps * places / 8)])
    steps = torch.cat([steps, 1 + limits.eps * places]).clamp(-torch.finfo(wide).max, torch.finfo(wide).max)
    return steps.to(wide)


def unaligned(device: torch.device | str, tasks: int = 2) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield labelled groups of 1100 elements that begin 1, 2 or 3 elements into their memory."""
    random = seeded(device)
    for dtype in FLOAT_DTYPES:
        base, tuned = group((1103,), [dtype] * (tasks + 1), random)
        for offset in (1, 2, 3):
            name = f"{dtype} from element {offset}".replace("torch.", "")
            yield name, base[offset:], [tensor[offset:] for tensor in tuned]


def spoiled(device: torch.device | str, dtype: torch.dtype = FLOAT32, tasks: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Return a base and fine-tuned tensors of 300 elements with NaN and infinity at a few places."""
    base, tuned = group((300,), [dtype] * (tasks + 1), seeded(device))
    tuned[0][171], tuned[-1][17], base[9] = float("nan"), float("-inf"), float("inf")
    return base, tuned


def _every_second_column(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def _slice_of_wider_rows(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), 7.0)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _from_the_second_element(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1,), 7.0), x.flatten()])[1:].view(x.shape)


# How a tensor can be stored: each takes a tensor and returns one with the same values.
LAYOUTS = {
    "from the second element": _from_the_second_element,
    "every second column": _every_second_column,
    "slice of wider rows": _slice_of_wider_rows,
    "transposed": _transposed,
}
