"""Tensors and numbers as callers have them, parameters of models, views, subclasses, NumPy: right, or refused."""

import numpy as np
import pytest
import torch
from compare import same_bits
from merging import group, tasks_of
from tensor_kinds import REFUSED, TAKEN

from r_tsvm_kernels import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    DTypeError,
    MergeConfig,
    merge_state_dicts,
    merge_tensors,
    ops,
    use_backend,
)
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.ops import Planes, Sparsifier

ALL = pytest.mark.parametrize("method", sorted(METHODS))


@ALL
@pytest.mark.parametrize("layout", TAKEN.values(), ids=TAKEN.keys())
def test_every_layout_gives_the_same_bits_and_no_graph(method, layout):
    base, tuned = group(tasks=tasks_of(method, 3))
    want = merge_tensors(base, tuned, method).weight
    got = merge_tensors(layout(base), [layout(model) for model in tuned], method).weight
    assert type(got) is torch.Tensor and not got.requires_grad and got.grad_fn is None
    assert same_bits(got, want) and got.is_contiguous()
    kept = merge_tensors(layout(base), [layout(model) for model in tuned], method, name="kept", exclude=["kept"]).weight
    assert same_bits(kept, base) and kept.is_contiguous()
    options = MergeConfig(method).options(len(tuned), "tensor")
    direct = METHODS[method].run(layout(base), [layout(model) for model in tuned], options).weight
    assert not direct.requires_grad and bool(direct.isfinite().all())


@ALL
def test_expanded_inputs(method):
    base, tuned = group(tasks=tasks_of(method, 2))
    row = torch.randn(1, 17).expand(24, 17)
    assert same_bits(merge_tensors(row, tuned, method).weight, merge_tensors(row.contiguous(), tuned, method).weight)
    models = [row] * len(tuned)
    assert same_bits(
        merge_tensors(base, models, method).weight,
        merge_tensors(base, [model.contiguous() for model in models], method).weight,
    )
    assert base.is_contiguous() and row.stride() == (0, 1)


@pytest.mark.parametrize("method", ["ties", "rtsvm"])
def test_a_model_s_parameters(method):
    torch.manual_seed(0)
    base, *tuned = (torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.LayerNorm(12)) for _ in range(3))
    merged = merge_state_dicts(dict(base.named_parameters()), [dict(m.named_parameters()) for m in tuned], method)
    plain = merge_state_dicts(base.state_dict(), [model.state_dict() for model in tuned], method)
    for name, weight in merged.state_dict.items():
        assert same_bits(weight, plain.state_dict[name]) and not weight.requires_grad
    base.load_state_dict(merged.state_dict)


EVERY_REFUSED = pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED.keys())


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning", "ignore:.*deprecated.*", "ignore:Sparse CSR.*")
@EVERY_REFUSED
@pytest.mark.parametrize("method", ["ties", "rtsvm", "linear"])
@pytest.mark.parametrize("position", [0, 2])
def test_merges_refuse_what_is_no_plain_tensor(method, position, make, error, message):
    base, tuned = group(tasks=2)
    tensors = [base, *tuned]
    tensors[position] = make(tensors[position])
    with pytest.raises(error, match=message) as caught:
        merge_state_dicts({"the.w": tensors[0]}, [{"the.w": tensor} for tensor in tensors[1:]], MergeConfig(method))
    assert "the.w" in str(caught.value)


def test_a_square_is_not_written_over_its_own_factor():
    planes = ops.symm_gram(ops.split_planes(torch.randn(8, 8) / 8), out_dtype="planes").matrix
    earlier = ops.symm_square(planes, 1.0, 1.0)
    assert isinstance(earlier.matrix, Planes)
    with pytest.raises(ConfigError, match=r"symm_square: .* share memory"):
        ops.symm_square(earlier.matrix, 1.0, 1.0, out=earlier)
    again = ops.symm_square(planes, 1.0, 1.0, out=earlier)
    assert torch.equal(again.matrix.dense(), ops.symm_square(planes, 1.0, 1.0).matrix.dense())


def test_numbers_of_numpy_and_torch_in_ops():
    base, tuned = group(tasks=2)
    want = ops.elect_and_sum(base, tuned, [0.5, 0.5], elect="sum", alpha=2.0)
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), [0.5, np.float64(0.5)], np.array([0.5, 0.5]), (0.5, 0.5)):
        assert torch.equal(ops.elect_and_sum(base, tuned, half, elect="sum", alpha=np.float32(2)), want)
    keep = ops.magnitude_select(base, 7)
    for seven in (np.int64(7), torch.tensor(7)):
        assert torch.equal(ops.magnitude_select(base, seven).mask(base), keep.mask(base))
    assert len(ops.magnitude_select(base, np.array([7, 9]))) == 2
    statistics = ops.task_statistics(base, tuned, sigma=np.float64(3), eps=torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(statistics.theta, ops.task_statistics(base, tuned).theta)
    pruned = ops.reweight_prune(base, tuned, statistics, density=np.array([0.25, 0.5]))
    assert [int(task.count_nonzero()) for task in pruned] == [102, 204]
    assert torch.equal(ops.random_mask((5,), np.float64(0.5), seed=np.int64(3)), ops.random_mask((5,), 0.5, seed=3))
    assert torch.equal(ops.add_update(base, base, np.float64(2)), ops.add_update(base, base, 2.0))


MISTAKES = {
    "a fraction as a count": (lambda b, t: ops.magnitude_select(b, 0.1), ConfigError, "0.1; use kept_count"),
    "no seed": (lambda b, t: ops.random_mask((3,), 0.5, seed=None), ConfigError, "seed must be a whole number"),
    "a number as a shape": (lambda b, t: ops.random_mask(3, 0.5, seed=1), ConfigError, "such as .3, 4., got 3"),
    "a negative size": (lambda b, t: ops.random_mask((2, -3), 0.5, seed=1), ConfigError, r"got \(2, -3\)"),
    "half a size": (lambda b, t: ops.random_mask((1.5,), 0.5, seed=1), ConfigError, "size must be a whole number"),
    "no probability": (lambda b, t: ops.random_mask((3,), None, seed=1), ConfigError, "keep_probability: expected"),
    "the base first": (lambda b, t: ops.task_gram(b, base=t), DTypeError, "expected a list of fine-tuned tensors"),
    "one tensor": (lambda b, t: ops.task_spread(b, t[0]), DTypeError, "expected a list of fine-tuned tensors"),
    "one sparsifier": (
        lambda b, t: ops.elect_and_sum(b, t, 1.0, sparsifiers=Sparsifier()), ConfigError, "one for each task"
    ),
    "a count as a selection": (lambda b, t: Sparsifier(largest=5), ConfigError, "largest must be a MagnitudeSelection"),
    "text for a probability": (lambda b, t: Sparsifier(keep_probability="half"), ConfigError, "expected a number"),
    "a list of booleans": (lambda b, t: Sparsifier(mask=[True]), DTypeError, "Sparsifier: mask"),
    "text for weights": (lambda b, t: ops.elect_and_sum(b, t, "ab"), ConfigError, "weights: expected a number"),
    "NaN for weights": (lambda b, t: ops.elect_and_sum(b, t, np.nan), ConfigError, "weights: expected finite numbers"),
    "huge weights": (lambda b, t: ops.elect_and_sum(b, t, [3e38, 3e38]), ConfigError, "that fit float32"),
    "a huge rescale": (
        lambda b, t: ops.elect_and_sum(b, t, 1.0, sparsifiers=[Sparsifier(rescale=1e39), Sparsifier()]),
        ConfigError,
        "weights times rescale .1e.39, 1.: expected finite numbers that fit float32",
    ),
    "a huge alpha": (lambda b, t: ops.add_update(b, t[0], 1e39), ConfigError, "alpha .1e.39.: expected finite"),
    "NaN for alpha": (lambda b, t: ops.add_update(b, t[0], float("nan")), ConfigError, "alpha: expected finite"),
    "NaN for sigma": (lambda b, t: ops.task_statistics(b, t, sigma="3"), ConfigError, "sigma and eps must be >= 0"),
    "no such method": (lambda b, t: merge_tensors(b, t, "tise"), ConfigError, "did you mean 'ties'"),
    "a dict": (lambda b, t: merge_tensors(b, t, {"merge_method": "ties"}), ConfigError, "expected the name of"),
    "one model": (lambda b, t: merge_tensors(b, t[0], "ties"), DTypeError, "expected a list of fine-tuned tensors"),
    "a module alone": (lambda b, t: merge_state_dicts(torch.nn.Linear(2, 2), [], "ties"), ConfigError, "at least one"),
    "a module of other layers": (
        lambda b, t: merge_state_dicts({"w": b}, [torch.nn.Linear(2, 2)], "ties"),
        CheckpointError,
        r"tuned\[0\]: its tensors are not the base's",
    ),
    "no base": (lambda b, t: ops.task_spread(None, t), DTypeError, "task_spread: base: expected a torch.Tensor"),
    "one state dict": (lambda b, t: merge_state_dicts({"w": b}, {"w": b}, "ties"), DTypeError, "a list of state dicts"),
    "no such backend": (lambda b, t: use_backend("tritn").__enter__(), BackendUnavailableError, "no backend 'tritn'"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_get_errors_of_our_own(call, error, message):
    with pytest.raises(error, match=message):
        call(*group(tasks=2))


def test_the_name_of_a_method_is_a_config():
    base, tuned = group()
    want = merge_tensors(base, tuned, MergeConfig(merge_method="ties")).weight
    assert torch.equal(merge_tensors(base, tuned, "ties").weight, want)
    assert torch.equal(merge_tensors(base, tuned, MergeConfig("ties")).weight, want)
    assert torch.equal(merge_state_dicts({"w": base}, [{"w": t} for t in tuned], "ties").state_dict["w"], want)
