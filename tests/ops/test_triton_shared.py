"""Positions beyond 2^31 and 2^32, computed by the shared code of the Triton kernels, in the interpreter."""

import pytest
import torch
from test_random_mask import word

from r_tsvm_kernels import backends

triton = pytest.importorskip("triton", reason="checks positions inside Triton kernels, and triton is not installed")
tl = triton.language

from r_tsvm_kernels.ops._triton import block_offsets, random_words  # noqa: E402

# These kernels take tensors of the CPU, which only the interpreter does; with a GPU the tests do not switch it on.
STATE = backends.triton_interpreter_state()
pytestmark = pytest.mark.skipif(STATE != backends.READY, reason=f"needs Triton's interpreter: {STATE}")

BLOCK = 128


@triton.jit
def offsets_kernel(block_ptr, offsets_ptr, inside_ptr, numel, BLOCK: tl.constexpr):
    offsets, inside = block_offsets(tl.load(block_ptr), numel, BLOCK)
    tl.store(offsets_ptr + tl.arange(0, BLOCK), offsets)
    tl.store(inside_ptr + tl.arange(0, BLOCK), inside.to(tl.int32))


@triton.jit
def words_kernel(block_ptr, seed_ptr, words_ptr, BLOCK: tl.constexpr):
    words = random_words(tl.load(block_ptr), tl.load(seed_ptr), tl.load(seed_ptr + 1), 0, BLOCK)
    tl.store(words_ptr + tl.arange(0, BLOCK), words.to(tl.int64))


# Numbers of programs are 32 bits; the last block here begins at 2^38 - 128.
@pytest.mark.parametrize("block", [0, 2**24 - 1, 2**24, 2**25, 2**27 + 1, 2**31 - 1])
def test_positions_beyond_32_bits(block):
    offsets, inside = torch.empty(BLOCK, dtype=torch.int64), torch.empty(BLOCK, dtype=torch.int32)
    number = torch.tensor(block, dtype=torch.int32)
    offsets_kernel[(1,)](number, offsets, inside, block * BLOCK + 100, BLOCK)
    assert offsets.tolist() == [block * BLOCK + i for i in range(BLOCK)]
    assert inside.tolist() == [1] * 100 + [0] * 28


@pytest.mark.parametrize("block", [0, 2**24, 2**27 - 1, 2**27, 2**31 - 1])
def test_random_words_beyond_32_bits(block):
    words = torch.empty(BLOCK, dtype=torch.int64)
    words_kernel[(1,)](torch.tensor(block, dtype=torch.int32), torch.tensor([77, 3]), words, BLOCK)
    assert words.tolist() == [word(77, 3, block * BLOCK + i) for i in range(BLOCK)]
