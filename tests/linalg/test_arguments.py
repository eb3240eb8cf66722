"""What the spectral functions accept as matrices, ranks and weights, and how they refuse the rest."""

import numpy as np
import pytest
import torch

from r_tsvm_kernels.errors import ConfigError, DeviceError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import (
    Factored,
    joint_svd,
    leading_subspaces,
    merge_factored,
    polar,
    truncated_svd,
    tsv_merge,
    tsv_merge_layers,
)

MATRICES = [torch.randn(20, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
FACTORED = [Factored(matrix[:, :4], matrix[:4]) for matrix in MATRICES]

CALLS = {
    "leading_subspaces": lambda matrices, ranks=3: leading_subspaces(matrices, ranks)[0].core,
    "truncated_svd": lambda matrices, ranks=3: truncated_svd(matrices, ranks).S,
    "tsv_merge": lambda matrices, ranks=3: tsv_merge(matrices, ranks).matrix,
    "tsv_merge products": lambda matrices, ranks=3: tsv_merge(matrices, ranks, solver="products").matrix,
    "tsv_merge_layers": lambda matrices, ranks=3: tsv_merge_layers([matrices] * 2, [ranks] * 2)[0].matrix,
    "polar": lambda matrices, ranks=3: polar(matrices)[0].matrix,
    "joint_svd": lambda matrices, ranks=3: joint_svd(matrices).U,
}
RANKED = [name for name in CALLS if name not in ("polar", "joint_svd")]
MERGES = {
    "tsv_merge": lambda weights: tsv_merge(MATRICES, 3, weights).matrix,
    "tsv_merge products": lambda weights: tsv_merge(MATRICES, 3, weights, solver="products").matrix,
    "tsv_merge_layers": lambda weights: tsv_merge_layers([MATRICES], [3], [weights])[0].matrix,
    "tsv_merge factored": lambda weights: tsv_merge(FACTORED, 3, weights).matrix,
    "merge_factored": lambda weights: merge_factored(FACTORED, 3, weights).update.dense(),
}


@pytest.mark.parametrize("name", CALLS)
def test_parameters_of_a_model_are_detached(name):
    expected = CALLS[name](MATRICES)
    result = CALLS[name]([torch.nn.Parameter(matrix) for matrix in MATRICES])
    assert not result.requires_grad and torch.equal(result, expected)


def test_factors_with_gradients_are_detached():
    factors = [Factored(torch.nn.Parameter(f.left), torch.nn.Parameter(f.right)) for f in FACTORED]
    for result in (tsv_merge(factors, 3).matrix, joint_svd(factors).U, factors[0].dense()):
        assert not result.requires_grad
    assert torch.equal(tsv_merge(factors, 3).matrix, tsv_merge(FACTORED, 3).matrix)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize(
    "ranks", [np.int64(3), [np.int32(3)] * 3, np.array([3, 3, 3]), torch.tensor([3, 3, 3]), (3,) * 3]
)
def test_whole_numbers_of_any_kind_are_ranks(name, ranks):
    assert torch.equal(CALLS[name](MATRICES, ranks), CALLS[name](MATRICES, [3, 3, 3]))


@pytest.mark.parametrize("count", [np.int64(2), torch.tensor(2), True + 1])
def test_a_rank_rule_returns_whole_numbers_of_any_kind(count):
    assert tsv_merge(MATRICES, lambda values: count).ranks == (2, 2, 2)
    assert merge_factored(FACTORED, lambda values: count).ranks == (2, 2, 2)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize(
    ("ranks", "error"), [(2.5, ConfigError), ([3, 3, "3"], ConfigError), ([3, 3, -1], ShapeError), ([3, 3], ShapeError)]
)
def test_other_ranks_are_refused(name, ranks, error):
    with pytest.raises(error, match="rank"):
        CALLS[name](MATRICES, ranks)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("weights", [2, 2.0, np.float32(2), np.full(3, 2.0), torch.full((3,), 2.0), torch.tensor(2.0)])
def test_numbers_of_any_kind_are_weights(name, weights):
    assert torch.equal(MERGES[name](weights), MERGES[name]([2.0, 2.0, 2.0]))


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, 10**400])
def test_weights_that_are_no_finite_numbers_are_refused(name, weight):
    with pytest.raises(ConfigError, match="a weight must be a finite number"):
        MERGES[name]([1.0, weight, 1.0])


@pytest.mark.parametrize("name", MERGES)
def test_another_number_of_weights_is_refused(name):
    with pytest.raises(ShapeError, match="3 matrices, 2 weights"):
        MERGES[name]([1.0, 1.0])


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("weight", [1e300, 1e39, 1.7e308])
def test_a_merge_beyond_its_dtype_is_refused(name, weight):
    if name == "merge_factored" and weight < 1.7e308:  # its result is float64
        assert torch.isfinite(MERGES[name]([weight, 1.0, 1.0])).all()
        return
    with pytest.raises(NonFiniteError, match="overflow"):
        MERGES[name]([weight, 1.0, 1.0])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrices_that_are_not_finite_are_refused(name, value):
    broken = [matrix.clone() for matrix in MATRICES]
    broken[0][2, 3] = value
    with pytest.raises(NonFiniteError):
        CALLS[name](broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(value):
    left = torch.full((5, 2), value)
    with pytest.raises(NonFiniteError):
        merge_factored([Factored(left, torch.ones(2, 4))], [1])
    with pytest.raises(NonFiniteError):
        joint_svd([Factored(left, torch.ones(2, 4))])
    with pytest.raises(ConfigError, match="scale"):
        Factored(torch.ones(5, 2), torch.ones(2, 4), value)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (torch.ones(3), ShapeError),
        (torch.ones(20, 12, dtype=torch.float16), DTypeError),
        (torch.ones(20, 12, dtype=torch.int64), DTypeError),
        (torch.ones(20, 12, dtype=torch.complex64), DTypeError),
        (torch.ones(20, 12).to_sparse(), DTypeError),
        (torch.ones(20, 12, device="meta"), (DTypeError, DeviceError)),
        (np.ones((20, 12), np.float32), DTypeError),
    ],
)
def test_what_is_no_dense_matrix_of_floats_is_refused(name, matrix, error):
    with pytest.raises(error):
        CALLS[name]([MATRICES[0], matrix, MATRICES[2]])


@pytest.mark.parametrize("name", ["truncated_svd", "tsv_merge", "tsv_merge products", "tsv_merge_layers", "joint_svd"])
def test_matrices_of_several_shapes_are_refused(name):
    with pytest.raises(ShapeError):
        CALLS[name]([MATRICES[0], torch.ones(8, 12), MATRICES[2]])
    with pytest.raises(ShapeError):
        merge_factored([FACTORED[0], Factored(torch.ones(3, 2), torch.ones(2, 4))], 1)


@pytest.mark.parametrize("name", ["truncated_svd", "tsv_merge", "merge_factored", "joint_svd"])
def test_no_matrices_are_refused(name):
    with pytest.raises(ShapeError):
        merge_factored([], []) if name == "merge_factored" else CALLS[name]([], [])


@pytest.mark.parametrize("rtol", [-1.0, 1.0, float("nan")])
def test_a_polar_tolerance_out_of_range_is_refused(rtol):
    with pytest.raises(ConfigError, match="rtol"):
        polar(MATRICES, rtol=rtol)
