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
from r_tsvm_kernels.ops import task_gram
from r_tsvm_kernels.ops._native import matrix

native_backend = some_backends(task_gram, "cpu")


@every_backend(task_gram, reference=False)
def test_cases(backend):
    check(task_gram, backend)


def truth(tuned, base=None, mask=None):
    vectors = np.stack([t.double().cpu().numpy() - (0 if base is None else base.double().cpu().numpy()) for t in tuned])
    if mask is not None:
        vectors = np.where(mask.cpu().numpy(), vectors, 0)
    vectors = vectors.reshape(len(tuned), -1)
    return torch.from_numpy(np.array([[math.fsum(s * t) for t in vectors] for s in vectors]))


@every_backend(task_gram)
@given(
    data=st.data(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    layouts=st.lists(layout_names, min_size=5, max_size=5),
    with_base=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_sums_without_rounding(backend, data, dtypes, layouts, with_base, masked, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base, tuned = group(shape, dtypes)
    base, *tuned = (LAYOUTS[how](t) for how, t in zip(layouts, (base, *tuned), strict=False))
    base, mask = base if with_base else None, torch.rand(shape) < 0.4 if masked else None
    got = task_gram(tuned, base=base, mask=mask, backend=backend)
    assert got.dtype == torch.float64 and torch.equal(got, got.T)
    exact = truth(tuned, base, mask)
    assert float((got.cpu() - exact).abs().max()) <= 1e-14 * float(exact.abs().max())


@every_backend(task_gram)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 20])
def test_any_number_of_tasks(backend, tasks):
    base, tuned = group((17, 31) if simulated(backend) else (37, 61), [torch.bfloat16] * (tasks + 1))
    assert relative_error(task_gram(tuned, base=base, backend=backend).cpu(), truth(tuned, base)) < 1e-14


@every_backend(task_gram)
def test_differences_are_not_rounded(backend):
    base, tuned = torch.full((4,), 1.0), torch.full((4,), 2.0**-30)
    assert float(task_gram([tuned], base=base, backend=backend)) == 4 * (1 - 2.0**-30) ** 2


@native_backend
@every_dtype
def test_same_bits_for_any_number_of_threads_and_any_layout(backend, dtype):
    base, tuned = group((301, 401), [dtype] * 4)
    mask = torch.rand(301, 401) < 0.5
    expected = task_gram(tuned, base=base, mask=mask, backend=backend)
    for threads in (1, 2, 3):
        for how in LAYOUTS.values():
            with torch_threads(threads):
                got = task_gram([how(t) for t in tuned], base=how(base), mask=mask.T.contiguous().T, backend=backend)
            assert same_bits(got, expected)


@every_backend(task_gram)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1)], ids=str)
def test_nothing_and_single_elements(backend, shape):
    base, tuned = group(shape, [torch.float32] * 3)
    assert relative_error(task_gram(tuned, base=base, backend=backend).cpu(), truth(tuned, base)) < 1e-14


@some_backends(task_gram, "triton interpreted")
def test_views_and_the_default_block(backend, monkeypatch):
    monkeypatch.undo()  # the fixture's small blocks
    views = torch.randn(12, 30)[:, ::2], [torch.randn(15, 12).mT, torch.randn(12, 40)[:, 3:18]]
    several = group((4999,), [torch.bfloat16] * 3)
    for (base, tuned), mask in ((views, (torch.rand(15, 12) < 0.7).mT), (several, torch.rand(4999) < 0.7)):
        got = task_gram(tuned, base=base, mask=mask, backend=backend)
        assert relative_error(got, truth(tuned, base, mask)) < 1e-14


@every_backend(task_gram)
def test_what_is_masked_does_not_matter(backend):
    base, tuned = group((50, 60), [torch.float32] * 3)
    mask = torch.rand(50, 60) < 0.5
    clean = task_gram(tuned, base=base, mask=mask, backend=backend)
    tuned[0][~mask] = math.nan
    tuned[1][~mask] = math.inf
    assert same_bits(task_gram(tuned, base=base, mask=mask, backend=backend), clean)
    assert not task_gram(tuned, base=base, backend=backend).isfinite().any()


@on_devices(task_gram)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base, tuned = group(shape, [dtype] * 10)
    mask = torch.rand(shape) < 0.7
    for number in (1, 2, 3, 9):
        for options in ({"base": base, "mask": mask}, {}):
            got, expected = (task_gram(tuned[:number], **options, backend=which) for which in (backend, "torch"))
            assert relative_error(got, expected) < 1e-13
            assert same_bits(got, task_gram(tuned[:number], **options, backend=backend))


@on_devices(task_gram)
def test_on_another_stream(backend):
    def run(base, x, which):
        return task_gram([x, 2 * x], base=base, mask=x > 0, backend=which)

    check_on_another_stream(task_gram, backend, run)


@large
@on_devices(task_gram)
def test_more_elements_than_a_32_bit_index_counts(backend):
    base, x = torch.zeros(2, BEYOND_32_BITS, dtype=torch.bfloat16).unbind()
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    assert task_gram([x, base], base=base, mask=x != 1, backend=backend).tolist() == [[13.0, 0.0], [0.0, 0.0]]


@every_backend(task_gram)
def test_what_it_refuses(backend):
    base, tuned = group((4, 5), [torch.float32] * 3)
    with pytest.raises(ShapeError, match="at least one"):
        task_gram([], base=base, backend=backend)
    with pytest.raises(ShapeError, match="at least one"):
        task_gram([], backend=backend)
    with pytest.raises(DTypeError, match="expected a list of fine-tuned tensors, got Tensor"):
        task_gram(base, backend=backend)
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        task_gram([tuned[0], tuned[1].T], backend=backend)
    with pytest.raises(DTypeError, match="int32"):
        task_gram([tuned[0].int()], base=base, backend=backend)
    with pytest.raises(DeviceError):
        task_gram([tuned[0].to("meta")], base=base, backend=backend)
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(DTypeError, match="the mask is of"):
        task_gram(tuned, base=base, mask=mask.int(), backend=backend)
    with pytest.raises(ShapeError, match="the mask"):
        task_gram(tuned, base=base, mask=mask.T, backend=backend)
    with pytest.raises(DeviceError, match="the mask"):
        task_gram(tuned, base=base, mask=mask.to("meta"), backend=backend)
    with pytest.raises(BackendUnavailableError, match="task_gram"):
        task_gram(tuned, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native, x, y = backends.native(backend), matrix(torch.zeros(4)), matrix(torch.zeros(5))
    for arguments, message in [(([], None), "no tensors"), (([x, y], None), "differ"), (([x], y), "differ")]:
        with pytest.raises(RuntimeError, match=f"task_gram: .*{message}"):
            native.task_gram(*arguments, 0, 0, 1)
