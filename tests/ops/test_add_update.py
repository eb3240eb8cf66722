import pytest
import torch
from cases import check, check_on_another_stream
from compare import assert_as_accurate, same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    BEYOND_32_BITS,
    DTYPES,
    LAYOUTS,
    VALUES,
    every_backend,
    every_dtype,
    every_model_shape,
    large,
    layout_names,
    on_devices,
    shapes,
)

from r_tsvm_kernels.errors import DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import add_update


@every_backend(add_update, reference=False)
def test_cases(backend):
    check(add_update, backend)


@every_backend(add_update)
@every_dtype
def test_equals_the_formula(backend, dtype):
    base, update = torch.randn(13, 17).to(dtype), torch.randn(13, 17)
    exact = base.double() + 0.7 * update.double()
    got = add_update(base, update, 0.7, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(got, base.to(got.dtype) + 0.7 * update.to(got.dtype), exact)


@every_backend(add_update, reference=False)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(VALUES)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(layout_names, layout_names),
    alpha=st.sampled_from([1.0, 0.7, -1e-30, 0.0]),
    out_dtype=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(backend, data, kind, dtypes, layouts, alpha, out_dtype, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base, update = torch.randn(shape), VALUES[kind](shape)
    base, update = (LAYOUTS[how](t.to(dtype)) for t, dtype, how in zip((base, update), dtypes, layouts, strict=True))
    got, expected = (
        add_update(base, update, alpha, out_dtype=out_dtype, backend=which) for which in (backend, "torch")
    )
    assert same_bits(got, expected)


@every_backend(add_update)
@every_dtype
def test_rounds_once_and_as_torch(backend, dtype):
    base, update = torch.randn(13, 17).to(dtype), torch.randn(13, 17)
    wide = add_update(base, update, 0.7, backend=backend)
    for narrow in DTYPES:
        assert same_bits(add_update(base, update, 0.7, out_dtype=narrow, backend=backend), wide.to(narrow))
    kept = add_update(base, torch.zeros(13, 17), out_dtype=dtype, backend=backend)
    assert same_bits(kept, base)  # as stored


@every_backend(add_update)
def test_base_comes_back_bit_for_bit_where_the_update_is_zero(backend):
    base = torch.tensor([[-0.0, 0.0, 1.0, -2.0]]).bfloat16()
    got = add_update(base, torch.tensor([[0.0, -0.0, 0.0, 1.0]]), backend=backend)
    assert same_bits(got.bfloat16()[:, :3], base[:, :3])
    assert got[0, 3] == -1.0
    assert same_bits(add_update(base, torch.ones(1, 4), alpha=0.0, backend=backend).bfloat16(), base)


@every_backend(add_update)
def test_what_it_refuses(backend):
    with pytest.raises(ShapeError):
        add_update(torch.zeros(2), torch.zeros(3), backend=backend)
    with pytest.raises(DTypeError):
        add_update(torch.zeros(2, dtype=torch.int64), torch.zeros(2), backend=backend)
    with pytest.raises(DTypeError, match="add_update: out_dtype must be float64, float32, float16, bfloat16, got"):
        add_update(torch.zeros(2), torch.zeros(2), out_dtype=torch.int32, backend=backend)
    with pytest.raises(DeviceError):
        add_update(torch.zeros(2), torch.zeros(2, device="meta"), backend=backend)


@on_devices(add_update)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base, update = 0.02 * torch.randn(shape), 1e-3 * torch.randn(shape)
    base, update = base.to(dtype), update.to(torch.promote_types(dtype, torch.float32))
    for out in (None, dtype):
        assert same_bits(*(add_update(base, update, 0.3, out_dtype=out, backend=which) for which in (backend, "torch")))


@on_devices(add_update)
def test_on_another_stream(backend):
    check_on_another_stream(add_update, backend, lambda base, x, which: add_update(base, x.float(), 0.5, backend=which))


@large
@on_devices(add_update)
def test_more_elements_than_a_32_bit_index_counts(backend):
    base, update = torch.zeros(2, BEYOND_32_BITS, dtype=torch.bfloat16).unbind()
    update[-3:] = torch.tensor([0.0, -2.0, 3.0])
    merged = add_update(base, update, 2.0, backend=backend)
    assert merged[-3:].tolist() == [0.0, -4.0, 6.0] and not merged[:-3].any()
