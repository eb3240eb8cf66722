"""Task matrices given as products, to methods that keep them so and to methods that do not."""

import pytest
import torch
from compare import relative_error, same_bits
from merging import tasks_of

from r_tsvm_kernels import DeviceError, DTypeError, MergeConfig, NonFiniteError, ShapeError, merge_tensors
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.methods import METHODS

SHAPE = (30, 24)
PLAIN = {"outlier_weighting": "none", "rank": "energy"}
# Options with which a method never forms a task matrix.
KEPT = {
    "task_arithmetic": [{}, {"normalize": True, "alpha": 0.4}],
    "linear": [{}, {"normalize": False}],
    "star": [{}],
    "knots": [{}, {"inner_method": "linear"}],
    "iso_c": [{}, {"alpha": 0.3}],
    "tsvm": [{}, {"alpha": 0.3}],
    "rtsvm": [PLAIN, PLAIN | {"rank": "fixed"}, PLAIN | {"rank": 3}, PLAIN | {"rank": [0.1, "noise", 4]}],
}
CASES = [(name, options) for name, found in KEPT.items() for options in found]
WEIGHTS = [1.0, 0.5, 2.0]


def updates(tasks=3, rank=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [
        Factored(*(torch.randn(s, generator=generator).to(dtype) for s in ((SHAPE[0], rank), (rank, SHAPE[1]))), 0.1)
        for _ in range(tasks)
    ]


def base_tensor(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_no_task_matrix_is_formed(method, options, monkeypatch):
    base, given, config = base_tensor(), updates(), MergeConfig(method, weight=WEIGHTS, **options)
    formed = merge_tensors(base, [base + update.dense() for update in given], config)
    monkeypatch.setattr("r_tsvm_kernels.values.base_plus", None)
    kept = merge_tensors(base, given, config)
    assert relative_error(kept.weight - base, formed.weight - base) < 1e-9
    assert kept.report.ranks == formed.report.ranks and kept.report.weights == formed.report.weights
    assert kept.report.captured_energy == pytest.approx(formed.report.captured_energy)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_them(method):
    tasks = tasks_of(method, 3)
    base, given = base_tensor(), updates(tasks)
    config = MergeConfig(method)
    dense = merge_tensors(base, [base + update.dense() for update in given], config, name="w").weight
    assert relative_error(merge_tensors(base, given, config, name="w").weight - base, dense - base) < 1e-7


@pytest.mark.parametrize("method", ["tsvm", "ties", "task_arithmetic"])
def test_beside_tuned_tensors(method):
    base, (first, second, _) = base_tensor(), updates()
    config = MergeConfig(method, weight=[1.0, 0.5])
    dense = merge_tensors(base, [base + first.dense(), base + second.dense()], config).weight
    mixed = merge_tensors(base, [first, base + second.dense()], config).weight
    assert relative_error(mixed - base, dense - base) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "tsvm", "iso_c", "star", "ties"])
def test_narrow_inputs_merge_in_float32(method, dtype):
    base, given = base_tensor(dtype), updates(dtype=dtype)
    config = MergeConfig(method)
    got = merge_tensors(base, given, config, out_dtype=torch.float32).weight
    wide = [Factored(u.left.double(), u.right.double(), u.scale) for u in given]
    exact = merge_tensors(base.double(), wide, config).weight
    assert relative_error(got, exact) < 1e-6


@pytest.mark.parametrize("method", [*KEPT, "ties", "iso_cts"])
def test_updates_of_zero_leave_the_base(method):
    base = base_tensor(torch.float32)
    base[0, 0] = -0.0
    empty = Factored(torch.zeros(SHAPE[0], 0), torch.zeros(0, SHAPE[1]))
    zero = Factored(torch.zeros(SHAPE[0], 3), torch.ones(3, SHAPE[1]))
    options = PLAIN if method == "rtsvm" else {}
    for given in ([empty, zero], [empty], [zero]):
        assert same_bits(merge_tensors(base, given, MergeConfig(method, **options)).weight, base)


def test_mean_of_updates():
    base, given = base_tensor(), updates()
    config = MergeConfig("iso_c", exclude_keys=["*embed*"])
    got = merge_tensors(base, given, config, name="embed")
    assert got.report.treatment == "mean"
    assert relative_error(got.weight, base + sum(update.dense() for update in given) / 3) < 1e-12


def test_a_dtype_rounds_tensors_and_not_factors():
    base, given = base_tensor(torch.float32), updates(dtype=torch.float32)
    got = merge_tensors(base, given, MergeConfig(merge_method="task_arithmetic", dtype="bfloat16", out_dtype="float32"))
    exact = base.bfloat16().double() + sum(update.dense().double() for update in given)
    assert relative_error(got.weight, exact) < 1e-6


def test_what_does_not_fit_is_refused():
    base, (update, *_) = base_tensor(), updates()
    config = MergeConfig("tsvm")
    with pytest.raises(ShapeError, match=r"q of tuned\[1\]: the update has shape \(24, 30\)"):
        turned = Factored(update.right.mT, update.left.mT)
        merge_tensors(base, [update, turned], config, name="q")
    with pytest.raises(ShapeError, match="the base"):
        merge_tensors(torch.zeros(30), [update], MergeConfig("task_arithmetic"))
    with pytest.raises(NonFiniteError, match="q of"):
        merge_tensors(base, [Factored(update.left / 0, update.right)], config, name="q")
    with pytest.raises(DeviceError, match="meta"):
        merge_tensors(base, [Factored(update.left.to("meta"), update.right.to("meta"))], config)
    with pytest.raises(DTypeError):
        Factored(update.left, update.right.float())
