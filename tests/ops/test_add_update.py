import pytest
import torch
from compare import assert_as_accurate, same_bits

from r_tsvm_kernels.errors import DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import add_update


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_formula(dtype):
    base, update = torch.randn(13, 17).to(dtype), torch.randn(13, 17)
    exact = base.double() + 0.7 * update.double()
    got = add_update(base, update, 0.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(got, base.to(got.dtype) + 0.7 * update.to(got.dtype), exact)


def test_base_comes_back_bit_for_bit_where_the_update_is_zero():
    base = torch.tensor([[-0.0, 0.0, 1.0, -2.0]]).bfloat16()
    got = add_update(base, torch.tensor([[0.0, -0.0, 0.0, 1.0]]))
    assert same_bits(got.bfloat16()[:, :3], base[:, :3])
    assert got[0, 3] == -1.0
    assert same_bits(add_update(base, torch.ones(1, 4), alpha=0.0).bfloat16(), base)


def test_what_it_refuses():
    with pytest.raises(ShapeError):
        add_update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(DTypeError):
        add_update(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(DeviceError):
        add_update(torch.zeros(2), torch.zeros(2, device="meta"))
