import pytest
import torch
import xxhash
from checkpoints import state_dict

from r_tsvm_kernels.checkpoint import Checksum, checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_over_the_raw_bytes(dtype):
    for tensor in state_dict(0, dtype).values():
        raw = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert checksum(tensor) == checksum(raw) == xxhash.xxh3_128_hexdigest(raw)


def test_of_pieces_is_that_of_the_whole():
    tensor = torch.randn(37, 5)
    state = Checksum()
    for row in range(0, 37, 4):
        state.update(tensor[row : row + 4])
    assert state.hexdigest() == checksum(tensor)


def test_of_the_values_not_of_the_memory():
    tensor = torch.randn(6, 4)
    assert checksum(tensor.mT) == checksum(tensor.mT.contiguous()) != checksum(tensor)
