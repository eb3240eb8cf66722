from dataclasses import replace

import pytest
import torch
from compare import relative_error, same_bits
from merging import tasks_of

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DTypeError,
    MergeConfig,
    NonFiniteError,
    ShapeError,
    merge_state_dicts,
    merge_tensors,
)
from r_tsvm_kernels.methods import METHODS

ALL = pytest.mark.parametrize("method", sorted(METHODS))


def group(shape=(12, 9), tasks=3, dtype=torch.float32):
    base = torch.randn(shape)  # and updates with something in common: model_stock gives the base otherwise
    return base.to(dtype), [(base + 0.05 + 0.1 * torch.randn(shape)).to(dtype) for _ in range(tasks)]


@ALL
@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_result_has_the_form_of_the_base(method, tasks, dtype):
    tasks = tasks_of(method, tasks)
    base, tuned = group((16, 11), tasks, dtype)
    copies = [t.clone() for t in (base, *tuned)]
    got = merge_tensors(base, tuned, MergeConfig(merge_method=method))
    assert (got.weight.dtype, got.weight.shape) == (dtype, base.shape)
    assert got.report.method == method and got.report.shape == (16, 11) and got.report.seconds > 0
    assert len(got.report.weights) == tasks
    assert not same_bits(got.weight, base)
    assert all(same_bits(a, b) for a, b in zip((base, *tuned), copies, strict=True))


@ALL
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integer_buffers_are_the_base_s(method, dtype):
    base = torch.arange(6).to(dtype)
    tuned = [base + 1 if dtype != torch.bool else ~base] * tasks_of(method, 1)
    got = merge_tensors(base, tuned, MergeConfig(merge_method=method))
    want = tuned[0] if method == "passthrough" else base
    assert same_bits(got.weight, want) and got.weight.data_ptr() != want.data_ptr()
    assert (got.report.treatment, got.report.reason) == ("base", f"{str(dtype)[6:]} buffer")


@ALL
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty_tensors(method, shape):
    got = merge_tensors(
        torch.empty(shape), [torch.empty(shape)] * tasks_of(method, 2), MergeConfig(merge_method=method)
    )
    assert got.weight.shape == shape and got.report.reason == "empty"


@ALL
def test_mixed_dtypes(method):
    base, tuned = group()
    mixed = [tuned[0].bfloat16(), tuned[1].half(), tuned[2].double()][: tasks_of(method, 3)]
    got = merge_tensors(base.bfloat16(), mixed, MergeConfig(merge_method=method, out_dtype="float32"))
    same = merge_tensors(base.bfloat16().double(), [t.double() for t in mixed], MergeConfig(merge_method=method))
    assert relative_error(got.weight, same.weight) < 1e-6


def test_dtype_rounds_the_inputs_and_out_dtype_the_output():
    base, tuned = group()
    config = MergeConfig(merge_method="task_arithmetic", dtype="bfloat16")
    got = merge_tensors(base, tuned, config).weight
    rounded = merge_tensors(base.bfloat16(), [t.bfloat16() for t in tuned], MergeConfig(merge_method="task_arithmetic"))
    assert same_bits(got, rounded.weight)
    config = MergeConfig(merge_method="task_arithmetic", out_dtype="float16")
    assert same_bits(
        merge_tensors(base, tuned, config).weight,
        merge_tensors(base, tuned, MergeConfig(merge_method="task_arithmetic")).weight.half(),
    )


def test_include_and_exclude():
    base, tuned = group()
    config = MergeConfig(merge_method="linear", include=("*.mlp.*", "head"), exclude=("*.1.*",))
    merged = {
        name: merge_tensors(base, tuned, config, name=name).report.treatment
        for name in ("layers.0.mlp.up", "layers.1.mlp.up", "layers.0.attn.q", "head")
    }
    assert merged == {
        "layers.0.mlp.up": "merge", "layers.1.mlp.up": "base", "layers.0.attn.q": "base", "head": "merge",
    }  # fmt: skip


@ALL
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_inputs_are_refused_by_name(method, bad):
    tasks = tasks_of(method, 2)
    models = ({"model": "/m/a"}, {})[:tasks]
    for position in range(1 + tasks):
        base, tuned = group(tasks=tasks)
        (base, *tuned)[position][3, 4] = bad
        with pytest.raises(NonFiniteError, match=f"w of {['the base', '/m/a', 'tuned.1.'][position]}: 1 of"):
            merge_tensors(base, tuned, MergeConfig(merge_method=method, models=models), name="w")


def test_excluded_tensors_may_hold_anything():
    base = torch.tensor([torch.nan, 1.0])
    assert same_bits(merge_tensors(base, [base], MergeConfig(exclude=("mask",)), name="mask").weight, base)


def test_overflow_of_the_output_dtype_is_an_error():
    base, tuned = torch.zeros(4, 4), [torch.full((4, 4), 60000.0)]
    config = MergeConfig(merge_method="task_arithmetic", parameters={"alpha": 2.0}, out_dtype="float16")
    with pytest.raises(NonFiniteError, match=r"1\.2e\+05 does not fit float16"):
        merge_tensors(base, tuned, config)


@ALL
def test_rounding_in_the_method_is_rounding_of_its_result(method, monkeypatch):
    base, tuned = group(tasks=tasks_of(method, 2))
    given, own = [], METHODS[method]

    def run(*args, **options):
        given.append(options.get("out_dtype"))
        return own.run(*args, **options)

    monkeypatch.setitem(METHODS, method, replace(own, run=run))
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        narrow = merge_tensors(base, tuned, MergeConfig(method, out_dtype=name)).weight
        wide = own.run(base, tuned, MergeConfig(method).options(len(tuned))).weight
        assert narrow.dtype == dtype and same_bits(narrow, wide.to(dtype))
    assert given == ([torch.bfloat16, torch.float16] if own.rounds else [None, None])


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("method", ["tsvm", "rtsvm", "iso_c", "star"])
def test_overflow_that_a_method_rounds_is_an_error(method, shape):
    tuned = [1e5 * torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(2)]
    options = {"solver": "products"} if method.endswith("tsvm") else {}
    with pytest.raises(NonFiniteError, match=r"experts.*: a value of magnitude .* does not fit float16"):
        merge_tensors(torch.zeros(shape), tuned, method, name="experts.down_proj", out_dtype="float16", **options)


def test_what_it_refuses():
    base, tuned = group()
    linear = MergeConfig(merge_method="linear")
    with pytest.raises(ShapeError, match=r"w: tuned\[1\] has shape \(12, 8\), the base has \(12, 9\)"):
        merge_tensors(base, [tuned[0], tuned[1][:, :8]], linear, name="w")
    with pytest.raises(DTypeError, match=r"tuned\[0\] must be one of .*float16, bfloat16, got torch.int64"):
        merge_tensors(base, [torch.ones(12, 9, dtype=torch.int64)], linear)
    with pytest.raises(DTypeError, match="float8"):
        eight_bit = torch.zeros(12, 9, dtype=torch.uint8).view(torch.float8_e4m3fn)
        merge_tensors(eight_bit, [eight_bit], linear)
    with pytest.raises(DTypeError, match=r"complex64 cannot be merged; exclude it"):
        merge_tensors(base.to(torch.complex64), [base.to(torch.complex64)], linear)
    with pytest.raises(DeviceError, match="meta"):
        merge_tensors(base, [torch.empty(12, 9, device="meta")], linear)
    with pytest.raises(ConfigError, match="at least one"):
        merge_tensors(base, [], linear)
    with pytest.raises(ConfigError, match="weight: got 2 for 3 fine-tuned models"):
        merge_tensors(base, tuned, MergeConfig("linear", weight=[1.0, 2.0]))


def test_state_dicts():
    names = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "norm.weight", "steps"]
    shapes = [(30, 8), (8, 8), (8, 8), (8, 8), (8,), ()]
    base = {n: torch.randn(s) if n != "steps" else torch.tensor(3) for n, s in zip(names, shapes, strict=True)}
    tuned = [{n: t + 1 if n == "steps" else t + torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    config = MergeConfig("task_arithmetic", alpha=[0.0, 1.0])
    merged = merge_state_dicts(base, tuned, config)
    assert list(merged.state_dict) == names == list(merged.reports)
    for name, alpha in [
        ("embed.weight", 0),
        ("layers.0.w", 0),
        ("layers.1.w", 0.5),
        ("layers.2.w", 1),
        ("norm.weight", 0),
    ]:
        exact = base[name].double() + alpha * sum(t[name].double() - base[name].double() for t in tuned)
        assert relative_error(merged.state_dict[name], exact) < 1e-6, name
    assert merged.state_dict["steps"] == 3


def test_state_dicts_must_have_the_same_names():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"tuned\[1\].*1 missing \(b\) and 1 extra \(c\)"):
        merge_state_dicts(base, [base, {"a": torch.zeros(2), "c": torch.zeros(2)}], MergeConfig())
