import math

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, SHAPES, available, layout_names, torch_threads

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import task_gram
from r_tsvm_kernels.ops._native import matrix

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
native_backend = pytest.mark.parametrize("backend", available("cpu"))


def group(shape, dtypes):
    origin = torch.randn(shape)
    return origin.to(dtypes[0]), [(origin + 0.1 * torch.randn(shape)).to(dtype) for dtype in dtypes[1:]]


def truth(tuned, base=None, mask=None):
    vectors = np.stack([t.double().numpy() - (0 if base is None else base.double().numpy()) for t in tuned])
    if mask is not None:
        vectors = np.where(mask.numpy(), vectors, 0)
    vectors = vectors.reshape(len(tuned), -1)
    return torch.from_numpy(np.array([[math.fsum(s * t) for t in vectors] for s in vectors]))


@every_backend
@given(
    shape=SHAPES,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    layouts=st.lists(layout_names, min_size=5, max_size=5),
    with_base=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_sums_without_rounding(backend, shape, dtypes, layouts, with_base, masked, seed):
    torch.manual_seed(seed)
    base, tuned = group(shape, dtypes)
    base, *tuned = (LAYOUTS[how](t) for how, t in zip(layouts, (base, *tuned), strict=False))
    base, mask = base if with_base else None, torch.rand(shape) < 0.4 if masked else None
    got = task_gram(tuned, base, mask=mask, backend=backend)
    assert got.dtype == torch.float64 and torch.equal(got, got.T)
    exact = truth(tuned, base, mask)
    assert float((got - exact).abs().max()) <= 1e-14 * float(exact.abs().max())


@every_backend
@pytest.mark.parametrize("tasks", [1, 2, 8, 20])
def test_any_number_of_tasks(backend, tasks):
    base, tuned = group((37, 61), [torch.bfloat16] * (tasks + 1))
    assert relative_error(task_gram(tuned, base, backend=backend), truth(tuned, base)) < 1e-14


@every_backend
def test_differences_are_not_rounded(backend):
    base, tuned = torch.full((4,), 1.0), torch.full((4,), 2.0**-30)
    assert float(task_gram([tuned], base, backend=backend)) == 4 * (1 - 2.0**-30) ** 2


@native_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_any_layout(backend, dtype):
    base, tuned = group((301, 401), [dtype] * 4)
    mask = torch.rand(301, 401) < 0.5
    expected = task_gram(tuned, base, mask=mask, backend=backend)
    for threads in (1, 2, 3):
        for how in LAYOUTS.values():
            with torch_threads(threads):
                got = task_gram([how(t) for t in tuned], how(base), mask=mask.T.contiguous().T, backend=backend)
            assert same_bits(got, expected)


@every_backend
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1)], ids=str)
def test_nothing_and_single_elements(backend, shape):
    base, tuned = group(shape, [torch.float32] * 3)
    assert relative_error(task_gram(tuned, base, backend=backend), truth(tuned, base)) < 1e-14


@every_backend
def test_what_is_masked_does_not_matter(backend):
    base, tuned = group((50, 60), [torch.float32] * 3)
    mask = torch.rand(50, 60) < 0.5
    clean = task_gram(tuned, base, mask=mask, backend=backend)
    tuned[0][~mask] = math.nan
    tuned[1][~mask] = math.inf
    assert same_bits(task_gram(tuned, base, mask=mask, backend=backend), clean)
    assert not task_gram(tuned, base, backend=backend).isfinite().any()


@every_backend
def test_what_it_refuses(backend):
    base, tuned = group((4, 5), [torch.float32] * 3)
    with pytest.raises(ShapeError, match="at least one"):
        task_gram([], base, backend=backend)
    with pytest.raises(ShapeError, match="at least one"):
        task_gram([], backend=backend)
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        task_gram([tuned[0], tuned[1].T], backend=backend)
    with pytest.raises(DTypeError, match="int32"):
        task_gram([tuned[0].int()], base, backend=backend)
    with pytest.raises(DeviceError):
        task_gram([tuned[0].to("meta")], base, backend=backend)
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(DTypeError, match="the mask is of"):
        task_gram(tuned, base, mask=mask.int(), backend=backend)
    with pytest.raises(ShapeError, match="the mask"):
        task_gram(tuned, base, mask=mask.T, backend=backend)
    with pytest.raises(DeviceError, match="the mask"):
        task_gram(tuned, base, mask=mask.to("meta"), backend=backend)
    with pytest.raises(BackendUnavailableError, match="task_gram"):
        task_gram(tuned, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native, x, y = backends.native(backend), matrix(torch.zeros(4)), matrix(torch.zeros(5))
    for arguments, message in [(([], None), "no tensors"), (([x, y], None), "differ"), (([x], y), "differ")]:
        with pytest.raises(RuntimeError, match=f"task_gram: .*{message}"):
            native.task_gram(*arguments, 0, 0, 1)
