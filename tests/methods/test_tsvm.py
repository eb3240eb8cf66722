import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels import MergeConfig, dispatch, merge_tensors
from r_tsvm_kernels.methods.spectral_costs import solver_for
from r_tsvm_kernels.methods.tsvm import TsvmParameters

CONFIG = MergeConfig("tsvm")


def group(shape, tasks, dtype=torch.float32, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tuned = [base + scale * torch.randn(shape, generator=generator) for _ in range(tasks)]
    return base.to(dtype), [t.to(dtype) for t in tuned]


def doubles(base, tuned):
    return base.double().numpy(), [t.double().numpy() for t in tuned]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(48, 48), (97, 41), (33, 120)], ids=str)
def test_update_equals_float64(shape, tasks, dtype):
    base, tuned = group(shape, tasks, dtype)
    got = merge_tensors(base, tuned, CONFIG, out_dtype=torch.float64)
    exact_base, exact_tuned = doubles(base, tuned)
    exact = oracle.tsvm(exact_base, exact_tuned)
    assert relative_error(got.weight.double() - base.double(), exact - exact_base) < 1e-4
    assert got.report.ranks == [int(min(shape) * (1 / tasks))] * tasks
    assert got.report.certificate.met


def test_stored_in_the_dtype_of_the_base():
    base, tuned = group((20, 20), 3, torch.bfloat16)
    wide = merge_tensors(base, tuned, CONFIG, out_dtype=torch.float32).weight
    assert same_bits(merge_tensors(base, tuned, CONFIG).weight, wide.bfloat16())


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (2, 3, 4, 4)], ids=str)
def test_tensors_that_are_no_matrices_get_the_mean(shape):
    base, tuned = group(shape, 3)
    got = merge_tensors(base, tuned, MergeConfig("tsvm", weight=[1.0, 2.0, 0.5], alpha=0.7))
    exact = (
        base.double() + 0.7 * sum(w * (t.double() - base.double()) for w, t in zip([1, 2, 0.5], tuned, strict=True)) / 3
    )
    assert relative_error(got.weight, exact) < 1e-6
    assert (got.report.treatment, got.report.reason) == ("mean", "not a matrix")


def test_exclude_keys_get_the_mean():
    base, tuned = group((12, 12), 3)
    config = MergeConfig("tsvm", exclude_keys=["*embed*"])
    got = merge_tensors(base, tuned, config, name="model.embed_tokens.weight")
    assert got.report.treatment == "mean"
    assert relative_error(got.weight, sum(tuned) / 3) < 1e-6
    assert merge_tensors(base, tuned, config, name="model.head.weight").report.treatment == "merge"


def test_weights_scale_the_tasks_and_alpha_the_sum():
    base, tuned = group((24, 30), 2)
    got = merge_tensors(base, tuned, MergeConfig("tsvm", weight=[0.5, 2.0], alpha=0.3))
    exact = oracle.tsvm(*doubles(base, tuned), alpha=0.3, weights=[0.5, 2.0])
    assert relative_error(got.weight, exact) < 1e-6
    scaled = [base + w * (t - base) for w, t in zip([0.5, 2.0], tuned, strict=True)]
    assert relative_error(merge_tensors(base, scaled, MergeConfig("tsvm", alpha=0.3)).weight, exact) < 1e-5


def test_fewer_rows_than_tasks_stay_the_base_s():
    base, tuned = group((2, 40), 3)
    got = merge_tensors(base, tuned, CONFIG)
    assert same_bits(got.weight, base)
    assert got.report.ranks == [0, 0, 0]
    assert "rank 0" in got.report.reason


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_one_task_is_the_fine_tune(m, n, seed):
    base, tuned = group((m, n), 1, seed=seed)
    assert relative_error(merge_tensors(base, tuned, CONFIG).weight, tuned[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_task_is_the_fine_tune_in_storage_precision(dtype):
    base, tuned = group((20, 30), 1, dtype)
    assert same_bits(merge_tensors(base, tuned, CONFIG).weight, tuned[0])


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, seed):
    base, tuned = group((15, 21), 3, seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge_tensors(base, tuned, MergeConfig("tsvm", weight=weights)).weight
    config = MergeConfig("tsvm", weight=[weights[i] for i in order])
    assert relative_error(merge_tensors(base, [tuned[i] for i in order], config).weight, plain) < 1e-6


@given(st.sampled_from([2.0**-30, 0.25, 8.0, -1.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, seed):
    base = torch.zeros(14, 18)
    _, tuned = group((14, 18), 2, seed=seed)
    plain = merge_tensors(base, tuned, CONFIG).weight
    assert relative_error(merge_tensors(base, [c * t for t in tuned], CONFIG).weight, c * plain) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_untouched_rows_and_columns_are_the_base_s_bit_for_bit(dtype):
    base, tuned = group((40, 30), 3, dtype)
    base[6, ::2] = -0.0
    for t in tuned:
        t[4:17] = base[4:17]
        t[:, 11] = base[:, 11]
    got = merge_tensors(base, tuned, CONFIG).weight
    assert same_bits(got[4:17], base[4:17]) and same_bits(got[:, 11], base[:, 11])
    changed = (got != base).float().mean()
    assert 0.4 < changed < 0.9


def test_float64_keeps_its_precision():
    base, tuned = group((20, 24), 2, torch.float64)
    exact = oracle.tsvm(*doubles(base, tuned))
    assert relative_error(merge_tensors(base, tuned, CONFIG).weight, exact) < 1e-12
    assert np.isfinite(exact).all()


@pytest.mark.parametrize(
    ("device", "kernels", "solver"), [("cpu", True, "eigen"), ("cuda", False, "eigen"), ("cuda", True, "products")]
)
def test_auto_takes_products_where_their_kernels_run(monkeypatch, device, kernels, solver):
    monkeypatch.setattr(dispatch, "by_reference", lambda device, *ops: not kernels)
    assert solver_for(TsvmParameters(), device) == solver
    assert {solver_for(TsvmParameters(solver=given), device) for given in ("eigen", "products")} == {
        "eigen",
        "products",
    }


def test_the_report_names_the_solver():
    base, tuned = torch.zeros(12, 8), [torch.randn(12, 8) for _ in range(2)]
    assert merge_tensors(base, tuned, "tsvm").report.solver == "eigen"
    products = merge_tensors(base, tuned, "tsvm", solver="products").report
    assert products.solver == "products"
    assert merge_tensors(base, tuned, "ties").report.solver == ""
