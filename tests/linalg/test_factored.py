import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.errors import ConfigError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.linalg import (
    Factored,
    choose_rank,
    core_space,
    energy_rank,
    leading_triplets,
    merge_factored,
    tsv_merge,
)


def lora(m, n, r, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    return Factored(left.to(dtype), right.to(dtype), scale=2.0)


@pytest.mark.parametrize("ranks", [[4, 4, 4], [1, 3, 0], [9, 9, 9]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_dense_merge(ranks, dtype):
    tasks = [lora(50, 70, 4, seed, dtype) for seed in range(3)]
    weights = [1.0, -0.5, 2.0]
    dense = [(2.0 * task.left.double()) @ task.right.double() for task in tasks]
    expected = tsv_merge(dense, ranks, weights)
    got = tsv_merge(tasks, ranks, weights)
    assert got.matrix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got.matrix, expected.matrix) < (1e-10 if dtype == torch.float64 else 1e-6)
    assert got.ranks == expected.ranks == tuple(min(rank, 4) for rank in ranks)
    assert got.captured_energy == pytest.approx(expected.captured_energy)
    assert got.certificate.route == "factored-float64"
    assert got.certificate.basis_rank == expected.certificate.basis_rank


def test_the_update_stays_factored():
    tasks = [lora(500, 300, 4, seed) for seed in range(2)]
    merged = merge_factored(tasks, [4, 4], [1.0, 1.0])
    assert merged.update.left.shape == (500, 8) and merged.update.right.shape == (8, 300)
    assert relative_error(merged.update.dense(), tsv_merge(tasks, [4, 4]).matrix) < 1e-6


def test_equal_adapters_share_their_directions():
    task = lora(40, 30, 3, 0)
    got = tsv_merge([task, task], [3, 3])
    assert got.certificate.basis_rank == (3, 3)
    assert relative_error(got.matrix, task.dense()) < 1e-6


def test_dependent_columns_lower_the_rank():
    left, right = torch.randn(20, 2), torch.randn(2, 20)
    got = tsv_merge([Factored(torch.cat([left, left], 1), torch.cat([right, right]))], [4])
    assert got.ranks == (2,)
    assert relative_error(got.matrix, 2 * left @ right) < 1e-6


def test_a_rule_sees_as_many_singular_values_as_the_matrix_has():
    seen = []
    tsv_merge([lora(12, 9, 2, 0)], [lambda values: seen.append(values) or energy_rank(values, 0.9)])
    for values in seen:  # also a little larger and smaller, to learn whether rounding decides
        assert values.shape == (9,) and (values[2:] < 1e-13 * values[0]).all()


def test_mixed_with_dense_matrices_it_is_formed():
    tasks = [lora(20, 30, 4, 0), torch.randn(20, 30)]
    expected = tsv_merge([tasks[0].dense(), tasks[1]], [4, 10])
    assert torch.equal(tsv_merge(tasks, [4, 10]).matrix, expected.matrix)


def test_zero_and_empty():
    zero = Factored(torch.zeros(6, 2), torch.randn(2, 5))
    got = tsv_merge([zero, lora(6, 5, 0, 0)], [2, 2])
    assert (got.ranks, got.captured_energy) == ((0, 0), (1.0, 1.0))
    assert not got.matrix.any()


def test_what_it_refuses():
    with pytest.raises(ShapeError, match="Factored"):
        Factored(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(DTypeError, match="Factored"):
        Factored(torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(DeviceError, match="Factored"):
        Factored(torch.zeros(3, 2), torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("answer", ["two", 2.5, None, torch.ones(2)], ids=str)
def test_a_rule_must_return_a_whole_number(answer):
    for call in (leading_triplets, lambda matrix, rule: merge_factored([matrix], rule)):
        with pytest.raises(ConfigError, match="whole number"):
            call(lora(12, 9, 2, 0), lambda values: answer)
        with pytest.raises(ShapeError, match="negative"):
            call(lora(12, 9, 2, 0), lambda values: -3)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (5, 5)], ids=str)
@pytest.mark.parametrize("rule", ["energy", "noise", 1])
def test_nothing_has_rank_0(shape, rule):
    empty = Factored(torch.zeros(shape[0], 2), torch.zeros(2, shape[1]))
    assert leading_triplets(empty, choose_rank(rule, (5, 5), 1)).S.shape == (0,)
    assert merge_factored([empty, empty], 1).update.dense().shape == shape


def test_what_is_not_factored_is_refused():
    matrix, task = torch.randn(20, 30), lora(20, 30, 3, 0)
    for call in (core_space, lambda matrices: merge_factored(matrices, 1), lambda ms: leading_triplets(ms[0], 1)):
        with pytest.raises(DTypeError, match="expected Factored, got Tensor"):
            call([matrix, task])
    for call in (core_space, lambda matrices: merge_factored(matrices, 1)):
        with pytest.raises(ShapeError):
            call([task, lora(21, 30, 3, 0)])
        with pytest.raises(ShapeError):
            call([])
        with pytest.raises(DTypeError, match="hold data"):
            call([task.to("meta")])


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), lambda x: x.to_sparse(), lambda x: x.to(torch.float8_e5m2)])
def test_factors_are_dense_tensors_of_floats(convert):
    with pytest.raises(DTypeError):
        Factored(convert(torch.ones(3, 2)), convert(torch.ones(2, 3)))
