import math

import numpy as np
import pytest
import torch
from cases import check, check_on_another_stream
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    BEYOND_32_BITS,
    DTYPES,
    LAYOUTS,
    every_backend,
    every_dtype,
    every_model_shape,
    group,
    large,
    layout_names,
    on_devices,
    shapes,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import task_spread
from r_tsvm_kernels.ops._native import matrix

native_backend = some_backends(task_spread, "cpu")


@every_backend(task_spread, reference=False)
def test_cases(backend):
    check(task_spread, backend)


@every_backend(task_spread)
@every_dtype
@pytest.mark.parametrize("tasks", [1, 2, 3, 20])
def test_equals_the_variance(backend, dtype, tasks):
    base, tuned = group((17, 31) if simulated(backend) else (67, 31), [dtype] * (tasks + 1))
    wide = torch.promote_types(dtype, torch.float32)
    deltas = np.stack([(t.to(wide) - base.to(wide)).double().cpu().numpy() for t in tuned])
    got = task_spread(base, tuned, backend=backend)
    assert got.dtype == torch.float64
    assert relative_error(got.cpu(), tasks * deltas.var(0)) < 1e-14


@every_backend(task_spread, reference=False)
@given(
    data=st.data(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    layouts=st.lists(layout_names, min_size=5, max_size=5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_reference(backend, data, dtypes, layouts, threads, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base, tuned = group(shape, dtypes)
    base, *tuned = (LAYOUTS[how](t) for how, t in zip(layouts, (base, *tuned), strict=False))
    with torch_threads(threads):
        got = task_spread(base, tuned, backend=backend)
    assert got.is_contiguous()
    assert same_bits(got, task_spread(base, tuned, backend="torch"))


@some_backends(task_spread, "triton interpreted")
def test_views_and_the_default_block(backend, monkeypatch):
    monkeypatch.undo()  # the fixture's small blocks
    views = torch.randn(12, 30)[:, ::2], [torch.randn(15, 12).mT, torch.randn(12, 40)[:, 3:18]]
    for base, tuned in (views, group((2500,), [torch.bfloat16] * 3)):
        assert same_bits(*(task_spread(base, tuned, backend=which) for which in (backend, "torch")))


@every_backend(task_spread)
def test_where_tasks_agree_it_is_zero(backend):
    base, (one,) = group((40, 50), [torch.bfloat16] * 2)
    assert not task_spread(base, [one], backend=backend).any()
    assert not task_spread(base, [one] * 2, backend=backend).any()


@every_backend(task_spread)
def test_values_that_are_not_finite_spoil_their_element_alone(backend):
    base, tuned = group((500,), [torch.float32] * 4)
    tuned[0][3], tuned[1][77], base[200] = math.nan, math.inf, -math.inf
    got = task_spread(base, tuned, backend=backend)
    assert got.isnan().nonzero().flatten().tolist() == [3, 77, 200]


@every_backend(task_spread)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1)], ids=str)
def test_nothing_and_single_elements(backend, shape):
    base, tuned = group(shape, [torch.float32] * 3)
    assert task_spread(base, tuned, backend=backend).shape == shape


@on_devices(task_spread)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base, tuned = group(shape, [dtype] * 10)
    for number in (1, 2, 3, 9):
        assert same_bits(*(task_spread(base, tuned[:number], backend=which) for which in (backend, "torch")))


@on_devices(task_spread)
def test_on_another_stream(backend):
    check_on_another_stream(task_spread, backend, lambda base, x, which: task_spread(base, [x, base], backend=which))


@large
@on_devices(task_spread)
def test_more_elements_than_a_32_bit_index_counts(backend):
    base, x = torch.zeros(2, BEYOND_32_BITS, dtype=torch.bfloat16).unbind()
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    spread = task_spread(base, [x, base], backend=backend)
    assert spread[-3:].tolist() == [0.5, 2.0, 4.5] and not spread[:-3].any()


@every_backend(task_spread)
def test_what_it_refuses(backend):
    base, tuned = group((4, 5), [torch.float32] * 3)
    with pytest.raises(ShapeError, match="at least one"):
        task_spread(base, [], backend=backend)
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        task_spread(base, [tuned[0], tuned[1].T], backend=backend)
    with pytest.raises(DTypeError, match="int32"):
        task_spread(base, [tuned[0].int()], backend=backend)
    with pytest.raises(DeviceError):
        task_spread(base, [tuned[0].to("meta")], backend=backend)
    with pytest.raises(BackendUnavailableError, match="task_spread"):
        task_spread(base, tuned, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    with pytest.raises(RuntimeError, match="task_spread: the tensors differ in size"):
        backends.native(backend).task_spread(matrix(torch.zeros(4)), [matrix(torch.zeros(5))], 0, 1)
