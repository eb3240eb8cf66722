"""General products of planes in Triton, on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._planes import OutDtype, Planes
from .._triton import device_of
from .._triton_products import aligned, cut, low_plane, padded, product_tile, tile_of

GROUP = 8  # blocks of rows that share their columns in the cache


@triton.jit
def gemm3_kernel(
    a_hi, a_lo, b_hi, b_lo, scale_ptr, share_ptr, c_ptr, c_lo_ptr, out_ptr, out_lo_ptr, m, n, k,
    stride_ab, stride_am, stride_ak, stride_bb, stride_bk, stride_bn, stride_cb, stride_cm, stride_cn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out = scale A B + share C`` of a batch of matrices, one tile; no C where `c_ptr` is None."""
    blocks = tl.cdiv(n, BN)
    tiles = tl.cdiv(m, BM) * blocks
    index, batch = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # the second axis of a grid ends at 65535
    first_row = index // (GROUP * blocks) * GROUP
    height = min(tl.cdiv(m, BM) - first_row, GROUP)
    row = first_row + index % (GROUP * blocks) % height
    column = index % (GROUP * blocks) // height

    a_first, b_first = tl.cast(batch, tl.int64) * stride_ab, tl.cast(batch, tl.int64) * stride_bb
    a_hi += a_first
    b_hi += b_first
    if a_lo is not None:
        a_lo += a_first
        b_lo += b_first
    value = product_tile(
        a_hi, a_lo, b_hi, b_lo, row, column, m, n, k, stride_am, stride_ak, stride_bk, stride_bn, BM, BN, BK, CHUNK
    )  # fmt: skip
    value *= tl.load(scale_ptr + batch)

    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    inside = (rows < m - row * BM) & (columns < n - column * BN)
    # Only scalars are int64: a tile of them would not fit into registers.
    above, left = tl.cast(row * BM, tl.int64), tl.cast(column * BN, tl.int64)
    if c_ptr is not None:
        corner = tl.cast(batch, tl.int64) * stride_cb + above * stride_cm + left * stride_cn
        at = rows * stride_cm + columns * stride_cn
        added = tl.load(c_ptr + corner + at, mask=inside, other=0.0).to(tl.float32)
        if c_lo_ptr is not None:
            added += tl.load(c_lo_ptr + corner + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / 2048.0)
        value += tl.load(share_ptr + batch) * added
    corner = tl.cast(batch, tl.int64) * m * n + above * n + left
    stored = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + corner + rows * n + columns, stored, mask=inside)
    if out_lo_ptr is not None:
        tl.store(out_lo_ptr + corner + rows * n + columns, low_plane(value, stored), mask=inside)


def run(
    A: Planes, B: Planes, scale: Tensor, share: Tensor, C: Tensor | Planes | None, out_dtype: OutDtype
) -> Tensor | Planes:
    """Return ``scale A @ B + share C``, planes without their scales; one leading dimension."""
    (batch, m, _), n = A.shape, B.shape[-1]
    tile = tile_of(A.hi)
    A, B = aligned(A, tile.BK), aligned(B, tile.BK)
    (_, rows, k), columns = A.shape, B.shape[-1]
    c: Tensor | None
    if isinstance(C, Planes):
        C = aligned(C, tile.BK)
        c, c_lo = C.hi, C.lo
    else:
        c, c_lo = C if C is None or (rows, columns) == (m, n) else padded(C, tile.BK), None
    dtype = out_dtype if isinstance(out_dtype, torch.dtype) else torch.float16
    first = torch.empty((batch, rows, columns), dtype=dtype, device=A.hi.device)
    second = torch.empty_like(first) if out_dtype == "planes" and A.lo is not None else None
    if first.numel():
        with device_of(first):
            gemm3_kernel[(triton.cdiv(rows, tile.BM) * triton.cdiv(columns, tile.BN) * batch,)](
                A.hi, A.lo, B.hi, B.lo, scale, share, c, c_lo, first, second, rows, columns, k,
                *A.hi.stride(), *B.hi.stride(), *((0, 0, 0) if c is None else c.stride()),
                GROUP=GROUP, **tile.options(),
            )  # fmt: skip
    return cut(Planes(first, second, torch.ones_like(A.scale)) if out_dtype == "planes" else first, m, n)
