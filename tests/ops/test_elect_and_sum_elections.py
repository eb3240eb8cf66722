"""Which sign is elected: by hand, where votes cancel, and where a majority is small."""

import numpy as np
import pytest
import torch
from variants import every_backend, simulated

from r_tsvm_kernels.ops import elect_and_sum


@every_backend(elect_and_sum)
def test_elections_by_hand(backend):
    base = torch.zeros(6)
    tuned = [torch.tensor([3.0, 1.0, -1.0, 0.0, 2.0, 1.0]), torch.tensor([-1.0, 1.0, -3.0, 0.0, -2.0, -9.0]),
             torch.tensor([-1.0, 1.0, 1.0, 5.0, 0.0, 1.0])]  # fmt: skip

    def merge(elect, weights=(1.0, 1.0, 1.0), normalize=True):
        return elect_and_sum(base, tuned, weights, elect=elect, normalize=normalize, backend=backend).tolist()

    assert merge("sum") == [3.0, 1.0, -2.0, 5.0, 2.0, -9.0]
    assert merge("count") == [-1.0, 1.0, -2.0, 5.0, 2.0, 1.0]
    assert merge("sum", normalize=False) == [3.0, 3.0, -4.0, 5.0, 2.0, -9.0]
    assert merge("sum", (1.0, 3.0, 1.0)) == [-4 / 4, 5 / 5, -10 / 4, 5.0, -2.0, -9.0]
    assert merge("unweighted", (1.0, 3.0, 1.0)) == [3.0, 5 / 5, -10 / 4, 5.0, 2.0, -9.0]
    assert merge("none", (1.0, 2.0, 1.0), normalize=False) == [0.0, 4.0, -6.0, 5.0, -2.0, -16.0]
    # A negative weight turns the task vector round before it votes; agreeing weights of sum 0 divide by 1.
    assert merge("sum", (1.0, -1.0, 0.0)) == [4.0, 1.0, -3.0, 0.0, 4.0, 10.0]
    # In an unweighted election it does not: the task is on the side of its difference, and is subtracted there.
    assert merge("unweighted", (2.0, -1.0, 1.0), normalize=False) == [6.0, 2.0, 1.0, 5.0, 4.0, 9.0]


# Decimal weights, so that many sums of quantised differences are 0 by the user's arithmetic, but not by float64's.
CANCELLING = [(0.3, 0.3, 0.6), (0.1, 0.2, 0.3), (0.7, 0.2, 0.9), (0.1, 0.7, -0.8)]


def exact_mean(whole, weights, elect):
    """Return the mean of the elected sign by arithmetic without rounding, and where the votes cancel."""
    tenths = [round(10 * w) for w in weights]
    v = np.stack([w * n for w, n in zip(tenths, whole, strict=True)])
    voters = np.stack(whole) if elect == "unweighted" else np.sign(v) if elect == "count" else v
    agree = np.sign(voters) == np.where(voters.sum(0) >= 0, 1, -1)
    divisor = (agree * np.array(tenths)[:, None]).sum(0)
    update = (agree * v).sum(0)
    return np.where(divisor == 0, update / 10, update / np.where(divisor == 0, 1, divisor)), voters.sum(0) == 0


@every_backend(elect_and_sum)
@pytest.mark.parametrize("elect", ["sum", "count", "unweighted"])
@pytest.mark.parametrize("weights", CANCELLING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plus_wins_where_votes_cancel(backend, elect, weights, dtype, monkeypatch):
    """Else their signs come from rounding, and the update of a 16-bit checkpoint is more than a tenth off."""
    size, orders = 20_000, ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0])
    if simulated(backend):
        size = 4000
        if backend == "triton":  # as long for a large block as for a small one
            monkeypatch.setattr(elect_and_sum.triton_kernel, "BLOCK", 4096)
            orders = orders[1:2]
    base = (8 + torch.rand(size)).to(dtype)
    # A few quanta of the dtype each, as of a short fine-tuning.
    quantum = torch.finfo(dtype).eps * 8
    whole = [torch.randint(-9, 10, base.shape) for _ in weights]
    tuned = [(base.double() + quantum * n).to(dtype) for n in whole]
    exact, cancelled = exact_mean([n.cpu().numpy() for n in whole], weights, elect)
    assert cancelled.sum() > (100 if size == 20_000 else 10)
    for order in orders:
        some, own = [tuned[i] for i in order], [weights[i] for i in order]
        got = elect_and_sum(base, some, own, elect=elect, normalize=True, backend=backend)
        error = np.abs((got.double() - base.double()).cpu().numpy() - quantum * exact)
        # A rounding of the merged weights, and of divisors such as 0.8 - 0.7.
        assert (error <= 8 * torch.finfo(torch.float32).eps + 2e-6 * np.abs(quantum * exact)).all(), order


@every_backend(elect_and_sum)
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_a_majority_by_little_wins(backend, scale):
    """What is not rounding decides: votes that differ in the last bit of float32."""
    base = torch.zeros(2)
    small = 1 + torch.finfo(torch.float32).eps
    tuned = [scale * torch.tensor([1.0, -1.0]), scale * torch.tensor([-small, small])]
    got = elect_and_sum(base, tuned, [1.0, 1.0], elect="sum", backend=backend)
    assert torch.equal(got, tuned[1])
    got = elect_and_sum(base.double(), [t.double() for t in tuned], [small, 1.0], elect="sum", backend=backend)
    assert (got > 0).all()  # these cancel


@every_backend(elect_and_sum)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agreeing_weights_that_cancel_divide_by_one(backend, dtype):
    base = torch.zeros(3, dtype=dtype)
    tuned = [torch.full_like(base, v) for v in (1.0, 2.0, -1.0)]
    got = elect_and_sum(base, tuned, [0.1, 0.2, -0.3], elect="sum", normalize=True, backend=backend)
    assert torch.allclose(got, torch.full_like(base, 0.1 + 0.4 + 0.3), rtol=1e-6, atol=0)
    # A weight that is small beside the others is none that cancels.
    got = elect_and_sum(base, [-tuned[0], tuned[1]], [1.0, 1e-12], elect="count", normalize=True, backend=backend)
    assert torch.allclose(got, tuned[1], rtol=1e-6, atol=0)
