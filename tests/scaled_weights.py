"""Weights with scales, as quantisers write them, and the values they stand for, in plain PyTorch."""

from pathlib import Path

import torch

from r_tsvm_kernels.checkpoint import ScaledHeader, TensorHeader

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(shape, scale_shape, block=(128, 128), dtype=torch.float8_e4m3fn, scale_dtype=torch.float32, seed=0):
    """Return a weight, its scales, and their product; the scales' shape may be any that belongs to the weight."""
    weight = (100 * draw(*shape, seed=seed)).to(dtype)
    scales = draw(*scale_shape, seed=seed + 1).abs().add(0.1).mul(0.01).to(scale_dtype)
    whole = scales.float()
    if len(scale_shape) == len(shape) - 1:  # rows
        whole = whole.unsqueeze(-1)
    whole = whole.reshape((1,) * (len(shape) - whole.ndim) + tuple(whole.shape))
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if 1 < whole.shape[axis] < shape[axis]:
            whole = whole.repeat_interleave(size, dim=axis).narrow(axis, 0, shape[axis])
    return weight, scales, weight.float() * whole


def mxfp4(experts, rows, columns, seed=0):
    """Return blocks and scales of packed experts, and the matrices (E, columns, rows) that loaders make of them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(115, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    table = torch.tensor(FP4)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
    values = torch.ldexp(pairs, scales.int().unsqueeze(-1) - 127)
    return blocks, scales, values.flatten(-2).mT.contiguous()


def scaled_header(weight, scales, block=(128, 128)):
    """The header of a weight that no file holds."""
    stored = [TensorHeader(Path("none"), t.dtype, tuple(t.shape), 0, t.nbytes) for t in (weight, scales)]
    shape = tuple(weight.shape)
    return ScaledHeader(Path("none"), torch.float32, shape, 0, 4 * weight.numel(), *stored, block, "scales")
