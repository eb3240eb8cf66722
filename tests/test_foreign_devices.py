"""Tensors on a device without float64, as Apple's mps: a stand-in that holds values on the CPU and computes nothing."""

import pytest
import torch
from merging import tasks_of
from torch.overrides import TorchFunctionMode

from r_tsvm_kernels import linalg, merge_state_dicts, merge_tensors, ops
from r_tsvm_kernels.errors import DeviceError
from r_tsvm_kernels.foreign_devices import foreign_device
from r_tsvm_kernels.methods import METHODS


class OnMps(torch.Tensor):
    """A tensor on mps, as far as anybody can see; it can only be moved to the CPU."""

    @staticmethod
    def __new__(cls, values):
        if values.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="mps")
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        to_cpu = function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.device)
        if to_cpu and torch.device((kwargs or {}).get("device", "mps")).type == "cpu":
            return args[0].values.clone()
        raise NotImplementedError(f"{function} is not implemented on the stand-in for mps")


class Moving(TorchFunctionMode):
    """Makes ``.to("mps")`` of a tensor on the CPU give the stand-in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and not isinstance(args[0], OnMps):
            places = [value for value in args[1:] if isinstance(value, torch.device | str)]
            if places and torch.device(places[0]).type == "mps":
                return OnMps(args[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def mps():
    with Moving():
        yield OnMps


@pytest.mark.parametrize("method", METHODS)
def test_every_method(mps, method):
    base = torch.randn(24, 16)
    tuned = [base + 0.1 * torch.randn(24, 16) for _ in range(tasks_of(method, 3))]
    expected = merge_tensors(base, tuned, method, name="w")
    got = merge_tensors(mps(base), [mps(model) for model in tuned], method, name="w")
    assert got.weight.device.type == "mps" and torch.equal(got.weight.values, expected.weight)
    assert got.report.shape == expected.report.shape


def test_ops_and_their_float64_results(mps):
    base, tuned = torch.randn(9, 5), [torch.randn(9, 5) for _ in range(2)]
    there = mps(base), [mps(model) for model in tuned]
    spread = ops.task_spread(*there)
    assert spread.device.type == "cpu" and torch.equal(spread, ops.task_spread(base, tuned))  # float64
    summed = ops.elect_and_sum(*there, [1.0, 0.5])
    assert summed.device.type == "mps" and torch.equal(summed.values, ops.elect_and_sum(base, tuned, [1.0, 0.5]))
    kept, expected = ops.magnitude_select(there[1][0], 7, base=there[0]), ops.magnitude_select(tuned[0], 7, base=base)
    assert torch.equal(kept.threshold.values, expected.threshold)
    rules = [[ops.Sparsifier(largest=found), ops.Sparsifier()] for found in (kept, expected)]
    summed = ops.elect_and_sum(*there, [1.0, 0.5], sparsifiers=rules[0])
    assert torch.equal(summed.values, ops.elect_and_sum(base, tuned, [1.0, 0.5], sparsifiers=rules[1]))


def test_linear_algebra(mps):
    matrices = [torch.randn(20, 12) for _ in range(3)]
    there = [mps(matrix) for matrix in matrices]
    merged, expected = linalg.tsv_merge(there, [4] * 3), linalg.tsv_merge(matrices, [4] * 3)
    assert merged.matrix.device.type == "mps" and torch.equal(merged.matrix.values, expected.matrix)
    assert merged.certificate == expected.certificate
    parts, expected = linalg.truncated_svd(there[0], 3), linalg.truncated_svd(matrices[0], 3)  # float64
    assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))
    layers = linalg.tsv_merge_layers([there, there], [[4] * 3] * 2)
    assert all(layer.matrix.device.type == "mps" for layer in layers)


def test_devices_are_not_mixed(mps):
    with pytest.raises(DeviceError, match=r"on one device, got mps(:0)? and cpu"):
        ops.add_update(mps(torch.ones(3)), torch.ones(3))
    with pytest.raises(DeviceError, match="meta"):
        ops.add_update(torch.ones(3, device="meta"), torch.ones(3, device="meta"))


def test_own_devices_are_left_alone():
    for value in ([torch.ones(2)], (1.0, [torch.ones(2, device="meta")]), [[[torch.ones(1)]]], [], [[]], ["x", None]):
        assert foreign_device(tuple(value)) is None
    assert merge_state_dicts({"w": torch.ones(2, 2)}, [{"w": torch.ones(2, 2)}], "linear").state_dict["w"].sum() == 4
