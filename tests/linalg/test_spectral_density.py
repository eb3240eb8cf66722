"""Estimates of eigenvalues by stochastic Lanczos quadrature, and the choice of a route by them."""

from unittest.mock import patch

import pytest
import torch
from spectra import spectrum

from r_tsvm_kernels import backends
from r_tsvm_kernels.linalg import eigenspaces, fixed_rank, leading_subspaces, tsv_merge
from r_tsvm_kernels.linalg.spectral_density import eigenvalues_at
from r_tsvm_kernels.linalg.tall_matrix import TallMatrix


@pytest.mark.parametrize("kind", ["flat", "power 0.3", "power 0.5", "low rank + noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eigenvalues_by_place(kind, dtype):
    matrix = spectrum(kind, 600, 400, 0)
    gram = (matrix.double().mT @ matrix.double()).to(dtype)
    exact = torch.linalg.eigvalsh(gram.double()).flip(0)
    places = [100, 200, 300]
    found = eigenvalues_at(gram, places)
    for place, share in zip(places, found, strict=True):
        near = exact[max(place - 40, 0) : place + 40] / exact[0]
        assert float(near[-1]) - 1e-3 <= share <= float(near[0]) + 1e-3
    assert eigenvalues_at(gram, [0, 400]) == pytest.approx([1.0, 0.0], abs=0.1)


def test_few_columns_and_low_rank():
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    assert eigenvalues_at(gram, [0, 3]) == pytest.approx([1.0, 0.0], abs=0.3)
    assert eigenvalues_at(torch.zeros(30, 30), [0, 10]) == [0.0, 0.0]
    one = torch.ones(30, 30)
    assert max(eigenvalues_at(one, [5, 15, 29])) < 0.05


def test_nearly_flat_spectra_are_recognised():
    gram = torch.eye(300) + 0.1 * torch.diag(torch.rand(300))
    assert eigenvalues_at(gram, [100], flat=8.0) is None
    gram[0, 0] = 50.0
    assert eigenvalues_at(gram, [100], flat=8.0) is not None


@pytest.fixture
def lapack(monkeypatch):
    """As without the native module."""
    monkeypatch.setattr(backends, "state", lambda backend: "not built")


@pytest.mark.usefixtures("lapack")
@pytest.mark.parametrize("kind", ["power 0.5", "power 0.75"])
def test_float32_is_not_tried_where_it_would_fail(kind):
    matrices = [spectrum(kind, 512, 512, seed) for seed in range(2)]
    with patch.object(eigenspaces, "eigh", wraps=eigenspaces.eigh) as eigh:
        merged = tsv_merge(matrices, fixed_rank((512, 512), 2))
    assert {call.args[0].dtype for call in eigh.call_args_list if len(call.args[0]) == 512} == {torch.float64}
    assert merged.certificate.escalations == ()
    assert merged.certificate.met
    # and it would have failed
    gram, matrix = TallMatrix(matrices[0]), 256
    with patch.object(eigenspaces, "_foresee"), pytest.raises(eigenspaces.ConvergenceError):
        eigenspaces.gram_float32(gram, matrix, 2e-8)


@pytest.mark.usefixtures("lapack")
@pytest.mark.parametrize("kind", ["flat", "power 0.2", "power 0.3"])
def test_float32_is_tried_where_it_suffices(kind):
    found = leading_subspaces(spectrum(kind, 512, 512, 0), 170)
    assert found.certificate.route == "gram-float32"
    assert found.certificate.escalations == ()
