"""A power of two as a factor of the matrices changes only the scale of the result, even if squares overflow or
underflow."""

import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.linalg import (
    Factored,
    core_space,
    joint_svd,
    leading_subspaces,
    leading_triplets,
    merge_factored,
    truncated_svd,
    tsv_merge,
)

# The squares of the last four are 0 or infinite in float64.
SCALES = [2.0**-400, 2.0**-535, 2.0**-1000, 2.0**540, 2.0**1000]


def matrices(scale):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, 50, generator=generator, dtype=torch.float64) * scale for _ in range(2)]


def products(scale):
    return [Factored(matrix, torch.eye(50, dtype=torch.float64)) for matrix in matrices(scale)]


def certificates(scale):
    return {
        "leading_subspaces": leading_subspaces(matrices(scale), 9)[0].certificate,
        "truncated_svd": truncated_svd(matrices(scale), 9).certificates[0],
        "tsv_merge": tsv_merge(matrices(scale), 9).certificate,
        "leading_triplets": leading_triplets(products(scale)[0], 9).certificate,
        "merge_factored": merge_factored(products(scale), 9).certificate,
        "joint_svd": joint_svd(matrices(scale)).certificate,
        "joint_svd of products": joint_svd(products(scale)).certificate,
    }


@pytest.mark.parametrize("scale", SCALES)
def test_certificates_do_not_depend_on_the_scale(scale):
    plain = certificates(1.0)
    for name, certificate in certificates(scale).items():
        assert certificate.met and not certificate.arbitrary, name
        assert certificate.error == pytest.approx(plain[name].error, rel=0.5), name
        assert certificate.gap == pytest.approx(plain[name].gap, rel=1e-6), name


@pytest.mark.parametrize("scale", SCALES)
def test_results_follow_the_scale(scale):
    dense = tsv_merge(matrices(1.0), 9).matrix
    assert relative_error(tsv_merge(matrices(scale), 9).matrix / scale, dense) < 1e-12
    merged = merge_factored(products(scale), 9)
    assert merged.ranks == (9, 9) and relative_error(merged.update.dense() / scale, dense) < 1e-10
    for found, matrix in zip(joint_svd(products(scale)).parts, matrices(1.0), strict=True):
        assert relative_error(torch.linalg.svdvals(found / scale), torch.linalg.svdvals(matrix)) < 1e-12
    space = core_space(products(scale))
    assert space.error < 1e-12
    for core, matrix in zip(space.cores, matrices(1.0), strict=True):
        assert relative_error(space.left @ (core / scale) @ space.right, matrix) < 1e-12
    assert products(scale)[0].norm() / scale == pytest.approx(float(matrices(1.0)[0].norm()))


@pytest.mark.parametrize("left, right, scale", [(2.0**700, 2.0**700, 2.0**-900), (2.0**-700, 2.0**-700, 2.0**900)])
def test_only_the_product_has_to_fit_its_dtype(left, right, scale):
    matrix, unit = matrices(1.0)[0], torch.eye(50, dtype=torch.float64)
    product = Factored(matrix * left, unit * right, scale)
    expected = torch.linalg.svdvals(matrix)[:4]
    assert relative_error(leading_triplets(product, 4).S / (left * scale) / right, expected) < 1e-12
    with pytest.raises(NonFiniteError):
        leading_triplets(Factored(matrix * 2.0**700, unit * 2.0**700), 4)


def test_tasks_that_cancel_are_judged_by_what_is_left_at_any_scale():
    first, second = matrices(1.0)
    errors = [
        merge_factored(
            [Factored(first * scale, torch.eye(50, dtype=torch.float64)),
             Factored((first + 1e-3 * second) * scale, torch.eye(50, dtype=torch.float64))],
            30, [1.0, -1.0],
        ).certificate.error
        for scale in (1.0, 2.0**-1000)
    ]  # fmt: skip
    assert errors[1] == pytest.approx(errors[0], rel=0.5)
