import math

import pytest
import torch
from cases import check
from compare import relative_error
from products import assert_as_accurate, dense, every_accuracy, every_low
from variants import every_backend, on_devices, some_backends

from r_tsvm_kernels.errors import ShapeError
from r_tsvm_kernels.ops import Planes, first_steering, purify_step, split_planes


def start_of(spectrum, rank, low=True, limits=(0.5, 1e-3), extra=2):
    """Matrices with these eigenvalues (B, n), as planes of scale 1, and their first steering."""
    B, n = spectrum.shape
    Q = torch.linalg.qr(torch.randn(B, n, n, dtype=torch.float64)).Q
    x = (Q * spectrum.double()[:, None]) @ Q.mT
    planes = split_planes(((x + x.mT) / 2).float(), low=low)
    plain = planes.dense()
    sums = plain.diagonal(dim1=-2, dim2=-1).sum(-1), plain.square().sum((-2, -1))
    tolerances = [tuple(torch.full_like(sums[0], limit) for limit in limits)]
    steering = first_steering(*sums, torch.full_like(sums[0], float(rank)), tolerances, extra)
    return planes, steering.of_unscaled(planes.scale)


@every_backend(purify_step, reference=False)
def test_cases(backend):
    check(purify_step, backend)


@every_backend(purify_step)
@every_low
@pytest.mark.parametrize("rank", [3, 30])
def test_a_step_shrinks_or_grows(backend, low, rank):
    planes, steering = start_of(torch.rand(2, 40), rank, low)
    got, following = purify_step(planes, steering, backend=backend)
    x = dense(planes)
    exact = x @ x if rank == 3 else 2 * x - x @ x
    assert_as_accurate(got, purify_step(planes, steering, backend="torch")[0], exact)
    assert torch.equal(got.hi, got.hi.mT) and torch.equal(got.scale, torch.ones(2))
    kept = dense(got)
    trace, square = kept.diagonal(dim1=-2, dim2=-1).sum(-1), kept.square().sum((-2, -1))
    torch.testing.assert_close(following.values[0].double().cpu(), trace, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(following.values[1].double().cpu(), square, rtol=1e-6, atol=0)


@every_backend(purify_step)
@every_low
def test_steps_lead_to_the_projector(backend, low):
    spectrum = torch.stack([torch.linspace(0, 1, 33), torch.linspace(0, 1, 33) ** 4])
    planes, steering = start_of(spectrum, 7, low)
    spare, states, traces = None, [], []
    X = planes
    for _ in range(40):
        old = X
        X, steering = purify_step(X, steering, out=spare, backend=backend)
        spare = None if old is planes else old
        states.append(steering.values[2].tolist())
        traces.append(steering.values[0].tolist())
    assert states[-1] == [-1.0, -1.0] and (steering.done >= 2).all()
    values = torch.linalg.eigvalsh(dense(X))
    exact = (torch.arange(33) >= 26).double().expand(2, -1)
    assert relative_error(values, exact) < (1e-5 if low else 2e-2)
    assert traces[-1] == pytest.approx([7.0, 7.0], abs=1e-4 if low else 0.1)
    assert torch.equal(steering.values[3].cpu(), torch.tensor([7.0, 7.0]))


@some_backends(purify_step, "triton interpreted", "triton device")  # the others take new memory
def test_what_has_been_copied_is_not_written_again(backend):
    planes, steering = start_of(torch.rand(2, 40), 7)
    done = torch.tensor([[0, 5], [0, 2]], dtype=torch.int32)
    steering.counts.copy_(done)
    zeros = torch.zeros_like(planes.hi)
    spare = Planes(zeros, zeros.clone(), torch.ones(2))
    got, following = purify_step(planes, steering, out=spare, backend=backend)
    assert got.hi.data_ptr() == spare.hi.data_ptr() and got.hi[0].any() and not got.hi[1].any()
    assert following.values[0, 1] == steering.values[0, 1] and following.done.tolist() == [0, 4]


@every_backend(purify_step)
def test_what_is_not_finite_is_seen(backend):
    planes, steering = start_of(torch.rand(1, 20), 7)
    planes.hi[0, 3, 3] = math.nan
    assert not purify_step(planes, steering, backend=backend)[1].values[:2].isfinite().any()


@every_backend(purify_step)
def test_refuses_a_result_of_another_shape(backend):
    planes, steering = start_of(torch.rand(1, 20), 7)
    other, _ = start_of(torch.rand(1, 21), 7)
    with pytest.raises(ShapeError, match="out"):
        purify_step(planes, steering, out=other, backend=backend)


@on_devices(purify_step)
@every_accuracy
@pytest.mark.parametrize("n", [1024, 1365, 4096])
def test_sizes_of_models(backend, n, low, allowed):
    x = torch.rand(1, n, n)
    x = (x + x.mT) / (2 * n)
    planes = split_planes(x, low=low, backend=backend)
    one = torch.ones(1)
    steering = first_steering(2 * one, one, 3 * one, [(0 * one, 0 * one)], 1).of_unscaled(planes.scale)
    got, _ = purify_step(planes, steering, backend=backend)
    exact = 2 * x.double() - x.double() @ x.double()
    assert relative_error(got.dense(), exact) < allowed
