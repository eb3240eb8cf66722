"""`calibrate: svc`, singular value calibration, after any method."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import group, merge, tasks_of
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import ConfigError, MergeConfig, decompose_checkpoints, merge_checkpoints, merge_tensors
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.methods import METHODS, calibrate_update
from r_tsvm_kernels.parts.recipe import linear_parameters

ROOT = Path(__file__).resolve().parents[2]
ISOTROPIC = ["iso_c", "iso_cts", "subspace_boosting"]
CALIBRATED = sorted({name for name, method in METHODS.items() if method.forms_vectors(True)} - {*ISOTROPIC})


def calibrated(base, tuned, merged, floor=0.1):
    """Li et al., algorithm 1, direction by direction."""
    left, values, right = np.linalg.svd(merged - base, full_matrices=False)
    gammas = []
    for u, s, v in zip(left.T, values, right, strict=True):
        shares = []
        for tensor in tuned:
            response = u @ (tensor - base)
            norm = np.linalg.norm(tensor - base)
            if norm:
                near = np.linalg.norm(response) > 1e-6 * norm
                shares.append(max(floor, s * v @ response / (response @ response) if near else 0.0))
        gammas.append(len(shares) / sum(shares) if s > 1e-13 * values[0] else 1.0)
    return base + left * (np.array(gammas) * values) @ right


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (5, 1)], ids=str)
def test_equals_float64_after_every_method(method, shape):
    base, tuned = group(shape, tasks_of(method, 3), torch.float64)
    plain = merge_tensors(base, tuned, method)
    got = merge_tensors(base, tuned, MergeConfig(method, calibrate="svc"))
    if plain.report.treatment == "mean":  # not merged by the method
        assert same_bits(got.weight, plain.weight)
        return
    exact = calibrated(base.numpy(), [tensor.numpy() for tensor in tuned], plain.weight.numpy())
    assert relative_error(got.weight - base, exact - base.numpy()) < 1e-8
    assert got.report.certificate is None and "calibrate" in got.report.stages
    assert "calibrate" not in plain.report.stages


@pytest.mark.parametrize("method", ISOTROPIC)
def test_equal_singular_values_have_no_directions(method, tmp_path):
    base, tuned = group()
    with pytest.raises(ConfigError, match=f"calibrate: {method} makes singular values equal"):
        merge_tensors(base, tuned, method, calibrate="svc")
    paths = _checkpoints(tmp_path)
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], calibrate="svc")
    with pytest.raises(ConfigError, match="makes singular values equal"):
        merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="core_space makes singular values equal"):
        merge_tensors(base, tuned, "core_space", calibrate="svc", isotropize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("floor", [0.01, 0.1, 1.0])
def test_floors_and_dtypes(dtype, floor):
    base, tuned = group((310, 90), 3, dtype)
    wide = [x.double() for x in (base, *tuned)]
    sums = (wide[0] + 0.4 * sum(tensor - wide[0] for tensor in wide[1:])).numpy()
    got = merge("task_arithmetic", base, tuned, alpha=0.4, calibrate="svc", calibrate_floor=floor)
    exact = calibrated(wide[0].numpy(), [tensor.numpy() for tensor in wide[1:]], sums, floor)
    assert relative_error(got.double() - wide[0], exact - wide[0].numpy()) < 1e-4


@given(st.integers(1, 4), st.sampled_from([0.3, 1.0, 2.0]), st.integers(0, 9))
def test_equal_tasks_are_counted_once_at_any_scale(tasks, alpha, seed):
    base, (tensor,) = group((9, 13), 1, torch.float64, seed=seed)
    got = merge("task_arithmetic", base, [tensor] * tasks, alpha=alpha, calibrate="svc")
    assert relative_error(got - base, tensor - base) < 1e-9


def test_a_task_without_a_response_counts_as_the_floor_and_an_unchanged_model_not_at_all():
    base = torch.zeros(4, 3, dtype=torch.float64)
    first, second = base.clone(), base.clone()
    first[0, 0], second[1, 1] = 2.0, 3.0
    got = merge("task_arithmetic", base, [first, second], calibrate="svc")
    assert relative_error(got, 2 / 1.1 * (first + second)) < 1e-12
    assert relative_error(merge("task_arithmetic", base, [first, base], calibrate="svc"), first) < 1e-12
    # What remains of a response by rounding is none.
    second[0, 0] = 1e-12
    again = merge("task_arithmetic", base, [first, second], calibrate="svc")
    assert relative_error(again, got) < 1e-9


def test_what_no_model_touched_stays():
    base, tuned = group((20, 16), dtype=torch.bfloat16)
    base[0, 0] = -0.0
    for tensor in tuned:
        tensor[3], tensor[:, 5], tensor[0, 0] = base[3], base[:, 5], base[0, 0]
    got = merge_tensors(base, tuned, "task_arithmetic", calibrate="svc").weight
    assert same_bits(got[3], base[3]) and same_bits(got[:, 5].contiguous(), base[:, 5].contiguous())
    assert same_bits(merge_tensors(base, [base, base], "ties", calibrate="svc").weight, base)
    # The tasks cancel: there is no update, though there are tasks.
    opposite = [base.double() + 1, base.double() - 1]
    assert same_bits(merge("task_arithmetic", base.double(), opposite, calibrate="svc"), base.double())


@pytest.mark.parametrize("shape", [(61,), (), (3, 5, 7)], ids=str)
def test_only_matrices_are_calibrated(shape):
    base, tuned = group(shape)
    plain, got = (merge_tensors(base, tuned, "ties", calibrate=own).weight for own in (None, "svc"))
    assert same_bits(got, plain)


def test_excluded_matrices_are_not_calibrated():
    base, tuned = group()
    for own in ({"exclude": ["w"]}, {"exclude_keys": ["w"]}):
        plain, got = (merge_tensors(base, tuned, "tsvm", name="w", calibrate=kind, **own) for kind in (None, "svc"))
        assert same_bits(got.weight, plain.weight)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsvm"])
def test_packed_experts_and_fused_matrices_are_calibrated_one_by_one(method):
    base, tuned = group((4, 12, 9), dtype=torch.float64)
    name = "layers.0.mlp.experts.gate_up_proj"
    got = merge_tensors(base, tuned, method, name=name, calibrate="svc").weight
    for index in range(4):
        alone = merge_tensors(base[index], [tensor[index] for tensor in tuned], method, calibrate="svc").weight
        assert relative_error(got[index] - base[index], alone - base[index]) < 1e-9
    base, tuned = group((24, 17), dtype=torch.float64)
    got = merge_tensors(base, tuned, method, name="qkv", split={"qkv": [10, 14]}, calibrate="svc").weight
    for rows in (slice(0, 10), slice(10, 24)):
        alone = merge_tensors(base[rows], [tensor[rows] for tensor in tuned], method, calibrate="svc").weight
        assert relative_error(got[rows] - base[rows], alone - base[rows]) < 1e-9


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm"])
def test_factors_equal_the_matrices_they_stand_for(method):
    torch.manual_seed(0)
    base = torch.randn(30, 20, dtype=torch.float64)
    factors = [Factored(torch.randn(30, 3).double(), torch.randn(3, 20).double(), 0.5) for _ in range(3)]
    config = MergeConfig(method, weight=[1.0, 0.5, 2.0], calibrate="svc")
    kept = merge_tensors(base, factors, config).weight
    formed = merge_tensors(base, [base + factor.dense() for factor in factors], config).weight
    assert relative_error(kept - base, formed - base) < 1e-8


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, seed):
    base, tuned = group((9, 13), dtype=torch.float64, seed=seed)
    plain = merge("task_arithmetic", base, tuned, alpha=0.3, calibrate="svc")
    got = merge("task_arithmetic", base, [tuned[i] for i in order], alpha=0.3, calibrate="svc")
    assert relative_error(got - base, plain - base) < 1e-7


def test_recipes_and_refusals(tmp_path):
    config = MergeConfig("ties", calibrate="svc", calibrate_floor=0.5)
    assert MergeConfig.from_dict({"merge_method": "ties", "calibrate": "svc", "calibrate_floor": 0.5}) == config
    assert eval(repr(config)) == config and not config.row_wise
    for values, message in (
        ({"calibrate": "svd"}, "calibrate"), ({"calibrate_floor": 0.0}, "calibrate_floor"),
        ({"calibrate_floor": float("nan")}, "calibrate_floor"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            MergeConfig("ties", **values)
    with pytest.raises(ConfigError, match="task_arithmetic with normalize: true"):
        MergeConfig("linear", calibrate="svc")
    with pytest.raises(ConfigError, match="merge without parts"):
        MergeConfig("tsvm", calibrate="svc", parts="parts")
    assert linear_parameters(MergeConfig("tsvm", calibrate="svc")) == frozenset()
    paths = _checkpoints(tmp_path)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], calibrate="svc")
    with pytest.raises(ConfigError, match=r"calibrate: .* cannot be decomposed"):
        decompose_checkpoints(recipe, tmp_path / "parts")


def _checkpoints(folder):
    torch.manual_seed(0)
    shapes = {"layers.0.weight": (300, 40), "layers.1.weight": (40, 300), "norm.weight": (40,)}
    paths = []
    for name in ("base", "one", "two"):
        save_file({key: torch.randn(shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors")
        paths.append(str(folder / f"{name}.safetensors"))
    return paths


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm"])
def test_checkpoints_are_calibrated_as_tensors_in_memory(tmp_path, method):
    paths = _checkpoints(tmp_path)
    base, *tuned = map(load_file, paths)
    merge_checkpoints(
        MergeConfig(method, base_model=paths[0], models=paths[1:], calibrate="svc"), tmp_path / "out.safetensors"
    )
    merged = load_file(tmp_path / "out.safetensors")
    for name, tensor in base.items():
        alone = merge_tensors(tensor, [model[name] for model in tuned], method, name=name, calibrate="svc").weight
        assert relative_error(merged[name] - tensor, alone - tensor) < 1e-6


PROGRAM = """
import json, sys
sys.path[:0] = ["tests"]
import torch
from merging import group
from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.bench.measure import peak_of
from r_tsvm_kernels.methods import TensorJob, calibrate_update, svc_cost

found = []
for shape in ((1200, 640), (640, 1200), (640, 640)):
    for dtype, itemsize in ((torch.bfloat16, 4), (torch.float64, 8)):
        base, tuned = group(shape, 3, dtype)
        merged = sum(tensor.to(torch.float64 if itemsize == 8 else torch.float32) for tensor in tuned) / 3
        calibrate_update(base[:64, :48], [t[:64, :48] for t in tuned], merged[:64, :48], 0.1)
        _, peak = peak_of(lambda: calibrate_update(base, tuned, merged, 0.1))
        found.append((peak, svc_cost(TensorJob(shape, 3, itemsize)).bytes))
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_below_what_is_declared():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=ROOT, env=environment,
        timeout=300,
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert len(found) == 6 and all(bound / 4 < peak < bound + (2 << 20) for peak, bound in found), found


def test_the_plan_has_room_for_the_calibration(tmp_path):
    from r_tsvm_kernels.plan import make_plan
    from r_tsvm_kernels.plan.costs import tensor_cost

    paths = _checkpoints(tmp_path)
    plans = [
        make_plan(MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:], calibrate=own), 2**40)
        for own in (None, "svc")
    ]
    name = "layers.0.weight"
    assert plans[0].row_wise(name) and not plans[1].row_wise(name)
    plain, own = (tensor_cost(plan, name) for plan in plans)
    assert own.bytes > plain.bytes and own.flops > plain.flops
    assert tensor_cost(plans[1], "norm.weight") == tensor_cost(plans[0], "norm.weight")


def test_the_function_alone():
    base, tuned = group((12, 9), dtype=torch.float64)
    merged = base + sum(tensor - base for tensor in tuned)
    got = calibrate_update(base, tuned, merged, 0.1)
    assert relative_error(got, calibrated(base.numpy(), [t.numpy() for t in tuned], merged.numpy())) < 1e-9
