"""Code that the Triton products on planes share: tile sizes, the loop over K, the lower triangle, the stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import BackendUnavailableError
from ._planes import OutDtype, Planes, SymmetricProduct
from ._triton import LAUNCH, device_of


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's output, the step through K, and how it is launched.

    Tensor cores add with rounding towards zero. Their sums over CHUNK of K are added up in float32 registers, with
    rounding to nearest, so that the bias does not grow with K (arXiv 2203.03341, section 3).
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    CHUNK: int = 512

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of a launch."""
        sizes = {"BM": self.BM, "BN": self.BN, "BK": self.BK, "CHUNK": self.CHUNK}
        return {**sizes, **LAUNCH, "num_warps": self.warps, "num_stages": self.stages}


ALIGNMENT = 16  # Triton knows of numbers whether they are multiples of it

# By compute capability; a capability in between uses the entry below it. BM is a multiple of BN, CHUNK of BK, and BK of
# ALIGNMENT.
TILES = {
    80: Tile(128, 64, 32, 8, 3),
    90: Tile(128, 128, 32, 8, 4),
    100: Tile(128, 128, 64, 8, 3),
    120: Tile(128, 64, 32, 8, 3),
}
INTERPRETED = Tile(32, 16, 16, 1, 1, CHUNK=32)


def tile_of(tensor: Tensor) -> Tile:
    """Return the tile for the device of `tensor`; on the CPU that of the interpreter.

    Raises:
        BackendUnavailableError: the GPU is older than compute capability 8.0.
    """
    if not tensor.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(tensor.device)
    known = [key for key in TILES if key <= 10 * major + minor]
    if not known:
        raise BackendUnavailableError(
            f"products on fp16 planes need a GPU of compute capability 8.0 or later, this is {major}.{minor}; "
            "use another precision"
        )
    return TILES[max(known)]


def aligned(planes: Planes, step: int) -> Planes:
    """Return planes with the same strides whose sizes are multiples of `step`, and filled with zeros up to there.

    Only a copy has other sizes. Kernels thus read 16 bytes at a time, asynchronously, and need no mask along K. Other
    sizes would be read 2 bytes at a time, through registers, which would not suffice.
    """
    hi, lo = planes.hi, planes.lo
    numbers = [stride for stride in hi.stride() if stride != 1]
    even = not any(size % step for size in hi.shape[1:]) and not any(number % ALIGNMENT for number in numbers)
    if even and (lo is None or lo.stride() == hi.stride()):
        return planes
    return Planes(padded(hi, step), None if lo is None else padded(lo, step), planes.scale)


def padded(matrices: Tensor, step: int) -> Tensor:
    """Return a copy with zeros up to multiples of `step`."""
    batch, rows, columns = matrices.shape
    copy = matrices.new_zeros(batch, triton.cdiv(rows, step) * step, triton.cdiv(columns, step) * step)
    copy[:, :rows, :columns] = matrices
    return copy


@triton.jit
def low_plane(value, hi):
    """Return the rounding error of `hi`, times 2^11, in fp16."""
    return ((value - hi.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def lower_tile(index, SPLIT: tl.constexpr):
    """Block row and block column of a tile that touches the lower triangle; SPLIT blocks of columns make a square."""
    square = index // SPLIT
    row = ((tl.sqrt_rn((8 * square + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > square, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= square, row + 1, row)
    return row, (square - row * (row + 1) // 2) * SPLIT + index % SPLIT


@triton.jit
def product_tile(
    a_hi, a_lo, b_hi, b_lo, row, column, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Block (row, column) of ``A B``, float32, without the scales: ``hi hi + (hi lo + lo hi) / 2^11``.

    `k` is a multiple of BK. The inner loop ends with each chunk, and its reads with it. In one loop over K, the sums of
    a chunk would be used between tensor-core instructions, which ptxas then lets wait for each other.
    """
    rows, columns, steps = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a_first = tl.cast(row * BM, tl.int64) * stride_am
    b_first = tl.cast(column * BN, tl.int64) * stride_bn
    a_offsets = rows[:, None] * stride_am + steps[None, :] * stride_ak
    b_offsets = steps[:, None] * stride_bk + columns[None, :] * stride_bn
    a_inside = (row * BM + rows < m)[:, None]
    b_inside = (column * BN + columns < n)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    correction = tl.zeros((BM, BN), tl.float32)
    for chunk in range(0, k, CHUNK):
        partial = tl.zeros((BM, BN), tl.float32)
        for at in range(chunk, min(chunk + CHUNK, k), BK):
            a_at = a_first + tl.cast(at, tl.int64) * stride_ak
            b_at = b_first + tl.cast(at, tl.int64) * stride_bk
            a = tl.load(a_hi + a_at + a_offsets, mask=a_inside, other=0.0)
            b = tl.load(b_hi + b_at + b_offsets, mask=b_inside, other=0.0)
            if a_lo is not None:
                a_rest = tl.load(a_lo + a_at + a_offsets, mask=a_inside, other=0.0)
                b_rest = tl.load(b_lo + b_at + b_offsets, mask=b_inside, other=0.0)
                correction = tl.dot(a, b_rest, correction)
                correction = tl.dot(a_rest, b, correction)
            partial = tl.dot(a, b, partial)
        total += partial
    return total + correction * (1.0 / 2048.0)


@triton.jit
def finish_tile(
    value, hi_ptr, lo_ptr, linear_ptr, out_ptr, out_lo_ptr, n, batch, above, left, stride_n, stride_k,
    lower, strictly, diagonal, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the linear term to a tile and store it, mirrored as well; return its parts of the trace and the norm.

    `above` and `left` are the tile's place, int64. `lower` says what is stored, `strictly` what is mirrored.
    """
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    # Only scalars are int64: a tile of them would not fit into registers.
    if linear_ptr is not None:
        corner = above * stride_n + left * stride_k
        at = rows * stride_n + columns * stride_k
        old = tl.load(hi_ptr + corner + at, mask=lower, other=0.0).to(tl.float32)
        if lo_ptr is not None:
            old += tl.load(lo_ptr + corner + at, mask=lower, other=0.0).to(tl.float32) * (1.0 / 2048.0)
        value += tl.load(linear_ptr + batch) * old
    first = tl.cast(batch, tl.int64) * n * n
    direct, mirrored = first + above * n + left, first + left * n + above
    stored = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + direct + rows * n + columns, stored, mask=lower)
    tl.store(out_ptr + mirrored + columns * n + rows, stored, mask=strictly)
    kept = stored.to(tl.float32)
    if out_lo_ptr is not None:
        low = low_plane(value, stored)
        tl.store(out_lo_ptr + direct + rows * n + columns, low, mask=lower)
        tl.store(out_lo_ptr + mirrored + columns * n + rows, low, mask=strictly)
        kept += low.to(tl.float32) * (1.0 / 2048.0)
    kept = tl.where(lower, kept, 0.0)
    trace = tl.sum(tl.sum(tl.where(diagonal, kept, 0.0), axis=1), axis=0)
    return trace, tl.sum(tl.sum(kept * tl.where(strictly, kept + kept, kept), axis=1), axis=0)


@triton.jit
def symmetric_kernel(
    hi_ptr, lo_ptr, linear_ptr, quadratic_ptr, done_ptr, out_ptr, out_lo_ptr, sums_ptr,
    n, k, stride_b, stride_n, stride_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``out = linear A + quadratic A A^T`` of a batch of matrices; no linear term where `linear_ptr` is None.

    Computes one tile that touches the lower triangle, and stores the part below the diagonal twice. `sums` gets the
    tile's part of the trace and of the squared norm. ``done`` 1 skips the product, 2 the whole tile.
    """
    squares = tl.cdiv(n, BM)
    tiles = squares * (squares + 1) // 2 * (BM // BN)
    index, batch = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # the second axis of a grid ends at 65535
    if done_ptr is not None:
        done = tl.load(done_ptr + batch)
        if done >= 2:
            return
        k = tl.where(done == 1, 0, k)
    row, column = lower_tile(index, BM // BN)
    first = tl.cast(batch, tl.int64) * stride_b
    hi_ptr += first
    if lo_ptr is not None:
        lo_ptr += first
    value = product_tile(
        hi_ptr, lo_ptr, hi_ptr, lo_ptr, row, column, n, n, k, stride_n, stride_k, stride_k, stride_n, BM, BN, BK, CHUNK
    )  # fmt: skip
    value *= tl.load(quadratic_ptr + batch)
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    below = row * BM - column * BN  # of the tile's corner, below the diagonal
    above, left = tl.cast(row * BM, tl.int64), tl.cast(column * BN, tl.int64)
    inside = rows < n - row * BM
    if below >= BN:  # masks that do not differ between columns leave accesses wide
        trace, norm = finish_tile(
            value, hi_ptr, lo_ptr, linear_ptr, out_ptr, out_lo_ptr, n, batch, above, left, stride_n, stride_k,
            inside, inside, rows < 0, BM, BN,
        )  # fmt: skip
    else:
        lower = inside & (columns <= rows + below)
        trace, norm = finish_tile(
            value, hi_ptr, lo_ptr, linear_ptr, out_ptr, out_lo_ptr, n, batch, above, left, stride_n, stride_k,
            lower, lower & (columns < rows + below), columns == rows + below, BM, BN,
        )  # fmt: skip
    part = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * 2
    tl.store(part, trace)
    tl.store(part + 1, norm)


def symmetric_product(
    A: Planes,
    quadratic: Tensor,
    out_dtype: OutDtype,
    linear: Tensor | None = None,
    done: Tensor | None = None,
    old: SymmetricProduct | None = None,
) -> SymmetricProduct:
    """Return ``linear A + quadratic A A^T``, A without its scale; see `symmetric_kernel` and `symm_square`."""
    matrix, sums = symmetric_tiles(A, quadratic, out_dtype, linear, done, old)
    trace, square_norm = sums.sum(1, dtype=torch.float64).float().unbind(1)  # in a fixed order
    if done is not None and old is not None:
        trace = torch.where(done >= 2, old.trace, trace)
        square_norm = torch.where(done >= 2, old.square_norm, square_norm)
    return SymmetricProduct(matrix, trace, square_norm)


def symmetric_tiles(
    A: Planes,
    quadratic: Tensor,
    out_dtype: OutDtype,
    linear: Tensor | None,
    done: Tensor | None,
    old: SymmetricProduct | None,
) -> tuple[Tensor | Planes, Tensor]:
    """Return the matrices of `symmetric_product`, and the sums (B, tiles, 2) over tiles; not those of copied ones."""
    batch, n, _ = A.shape
    tile = tile_of(A.hi)
    A = aligned(A, tile.BK)
    hi, low = A.hi, A.lo
    _, size, k = hi.shape
    into = old.matrix if old is not None and isinstance(old.matrix, Planes) else None
    direct = into is not None and size == n and into.hi.is_contiguous()
    matrix: Tensor | Planes
    if into is not None and direct:
        matrix = into
    elif out_dtype == "planes":
        empty = hi.new_empty(batch, size, size)
        matrix = Planes(empty, None if low is None else torch.empty_like(empty), torch.ones_like(A.scale))
    else:
        matrix = hi.new_empty((batch, size, size), dtype=torch.float32)
    squares = triton.cdiv(size, tile.BM)
    tiles = squares * (squares + 1) // 2 * (tile.BM // tile.BN)
    sums = torch.empty((batch, tiles, 2), dtype=torch.float32, device=hi.device)
    first, second = (matrix, None) if isinstance(matrix, Tensor) else (matrix.hi, matrix.lo)
    state = done if done is None or direct else done.clamp(max=1)  # nothing has been copied to a new matrix
    if batch * n:
        with device_of(hi):
            symmetric_kernel[(tiles * batch,)](
                hi, low, linear, quadratic, state, first, second, sums, size, k, *hi.stride(), **tile.options()
            )  # fmt: skip
    if size != n:
        matrix = cut(matrix, n, n)
    if into is not None and not direct:
        matrix = _write(into, matrix, done)
    return matrix, sums


def cut(matrix: Tensor | Planes, rows: int, columns: int) -> Tensor | Planes:
    """Return the upper left part of a product of padded planes: planes as a view, a tensor contiguous."""
    if isinstance(matrix, Tensor):
        return matrix[:, :rows, :columns].contiguous()
    hi, lo = (None if plane is None else plane[:, :rows, :columns] for plane in (matrix.hi, matrix.lo))
    assert hi is not None
    return Planes(hi, lo, matrix.scale)


def _write(into: Planes, new: Tensor | Planes, done: Tensor | None) -> Planes:
    """Copy `new` to planes that no kernel writes to, except matrices that are done twice."""
    assert isinstance(new, Planes)
    for target, source in ((into.hi, new.hi), (into.lo, new.lo)):
        if target is not None and source is not None:
            target.copy_(source if done is None else torch.where((done >= 2)[:, None, None], target, source))
    return into
