import math

import pytest
import torch
from cases import check
from compare import relative_error
from products import assert_as_accurate, assert_same_sums, dense, every_accuracy, every_draw, every_low
from variants import every_backend, on_devices, some_backends

from r_tsvm_kernels.errors import ShapeError
from r_tsvm_kernels.ops import split_planes, symm_gram, symm_square


def symmetric_planes(*shape, low=True, scale=1.0):
    x = torch.randn(*shape, shape[-1])
    return split_planes(scale * (x + x.mT) / (2 * math.sqrt(shape[-1])), low=low)


@every_backend(symm_square, reference=False)
def test_cases(backend):
    check(symm_square, backend)


@every_backend(symm_square)
@every_low
@pytest.mark.parametrize("n", [1, 31, 32, 50, 97])
def test_is_the_polynomial(backend, n, low):
    planes = symmetric_planes(3, n, low=low)
    alpha, beta = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.0, 2.0, -3.0])
    got = symm_square(planes, alpha, beta, backend=backend)
    x = dense(planes)
    exact = alpha.double().cpu()[:, None, None] * (x @ x) + beta.double().cpu()[:, None, None] * x
    if low:
        assert relative_error(dense(got.matrix), exact) < 4e-7
    assert_as_accurate(got.matrix, symm_square(planes, alpha, beta, backend="torch").matrix, exact)
    assert torch.equal(got.matrix.scale, torch.ones(3))
    assert torch.equal(got.matrix.hi, got.matrix.hi.mT)
    assert not low or torch.equal(got.matrix.lo, got.matrix.lo.mT)
    assert_same_sums(got)


@every_backend(symm_square)
@pytest.mark.parametrize("reused", [False, True])
def test_what_is_done_is_copied_once(backend, reused):
    planes = symmetric_planes(3, 40, scale=8.0)
    plain, copy, scratch = (symm_square(planes, *factors, backend=backend) for factors in ((-1, 2), (0, 1), (0, 1)))
    done = torch.tensor([0, 1, 2], dtype=torch.int32)
    got = symm_square(planes, -1.0, 2.0, done=done, out=scratch if reused else None, backend=backend)
    assert torch.equal(got.matrix.dense()[0], plain.matrix.dense()[0])
    assert torch.equal(got.matrix.dense()[1:], copy.matrix.dense()[1:])
    assert relative_error(got.trace[1:].cpu(), copy.trace[1:].cpu()) < 1e-6


@some_backends(symm_square, "triton interpreted", "triton device")  # the others take new memory
def test_what_has_been_copied_is_not_written_again(backend):
    planes = symmetric_planes(3, 40, scale=8.0)
    scratch = symm_square(planes, 0.0, 0.0, backend=backend)
    scratch.trace.fill_(7.0)
    done = torch.tensor([0, 1, 2], dtype=torch.int32)
    got = symm_square(planes, -1.0, 2.0, done=done, out=scratch, backend=backend)
    assert got.matrix.hi.data_ptr() == scratch.matrix.hi.data_ptr()
    assert not got.matrix.hi[2].any() and got.trace[2] == 7


@every_backend(symm_square)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(backend, bad):
    x = torch.eye(20)
    x[3, 3] = bad
    assert not symm_square(split_planes(x), -1.0, 2.0, backend=backend).square_norm.isfinite()


@every_backend(symm_square)
def test_refuses_a_result_of_another_shape(backend):
    with pytest.raises(ShapeError, match="out"):
        symm_square(symmetric_planes(4), 1.0, 1.0, out=symm_gram(split_planes(torch.ones(4, 6))), backend=backend)


@on_devices(symm_square)
@every_draw
@every_accuracy
@pytest.mark.parametrize("n", [1024, 1365, 4096])
def test_sizes_of_models(backend, draw, n, low, allowed):
    x = draw(n, n)
    x = (x + x.mT) / (2 * n)
    got = symm_square(split_planes(x, low=low, backend=backend), -1.0, 2.0, backend=backend)
    exact = 2 * x.double() - x.double() @ x.double()
    assert relative_error(got.matrix.dense(), exact) < allowed
    assert torch.equal(got.matrix.hi, got.matrix.hi.mT)


@on_devices(symm_square)
def test_a_step_is_the_same_in_a_cuda_graph(backend):
    planes = symmetric_planes(3, 512)
    done = torch.tensor([0, 1, 0], dtype=torch.int32)
    eager = symm_square(planes, -1.0, 2.0, done=done, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = symm_square(planes, -1.0, 2.0, done=done, backend=backend)
    graph.replay()
    assert torch.equal(captured.matrix.hi, eager.matrix.hi) and torch.equal(captured.trace, eager.trace)
