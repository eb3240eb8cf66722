"""The count of second solves, on a small instance; the committed one keeps its bound."""

import pytest
import torch

from benchmarks import RESULTS
from r_tsvm_kernels.bench import read_rows


def numbers(rows, kind):
    return sum(row["median"] for row in rows if row["metric"] == kind)


def test_few_trained_matrices_are_solved_twice():
    rows = [row for row in read_rows(RESULTS / "second_solves.json") if "trained" in row["options"]["matrices"]]
    assert numbers(rows, "matrices") > 100
    assert numbers(rows, "solved twice") <= 0.1 * numbers(rows, "matrices")


def test_what_is_counted():
    pytest.importorskip("sklearn", reason="needs scikit-learn: its digits train the models")
    from benchmarks.second_solves import counted, decaying, demo_family

    torch.manual_seed(0)
    layers = list(demo_family(steps=5))
    rows = counted("trained", iter(layers[1:3]))
    assert numbers(rows, "matrices") == 6 and numbers(rows, "solved twice") == 0
    steep, flat = (torch.stack([decaying(kind, 96, seed) for seed in range(2)]) for kind in ("exponential 9", "flat"))
    rows = counted("spectra", iter([steep, flat]))
    assert [numbers(rows, kind) for kind in ("matrices", "compressed", "solved twice")] == [4, 2, 0]
