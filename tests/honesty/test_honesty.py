"""A fixed sample of the calls that `benchmarks/honesty.py` judges by the thousand, and whether the judge can judge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from r_tsvm_kernels.errors import ConvergenceError
from r_tsvm_kernels.linalg import BACKWARD_ERROR, Cut, eigenspaces, weighted_eigen
from r_tsvm_kernels.linalg.products import merge as products_merge
from r_tsvm_kernels.linalg.products import weighted
from r_tsvm_kernels.linalg.products.turning import interpret
from r_tsvm_kernels.linalg.products.weighted_accuracy import Accuracy

from .inputs import problem
from .judge import Verdict, judge_subspaces, judge_tsv_merge, judge_weighted, judged, sizes

CALLS = 40
# Every batch takes as long; the others are left to `make test-all`.
BATCHES = [*range(2), *(pytest.param(number, marks=pytest.mark.exhaustive) for number in range(2, 12))]


def verdicts(first: int, count: int) -> list[Verdict]:
    found = []
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        found.append(judged(rng, problem(rng)))
    return found


@pytest.mark.parametrize("batch", BATCHES)
def test_no_certificate_is_dishonest(batch):
    found = verdicts(CALLS * batch, CALLS)
    assert [verdict for verdict in found if verdict.outcome == "dishonest"] == []
    outcomes = Counter(verdict.outcome for verdict in found)
    assert outcomes["judged"] >= 0.75 * CALLS
    assert sum(verdict.needless for verdict in found) <= 0.1 * CALLS
    assert len({verdict.name for verdict in found}) >= 8


# Estimates that were once thought enough, or that leave something out: the judge must find each of them out.
HONEST, CERTIFICATE = Cut.error, weighted_eigen._certificate
GOOD = Accuracy(1e-7, 1e-7, 0.0, (1.0, 1.0), 1.0)


def nothing(cut, allowed=0.0, **_):
    return BACKWARD_ERROR, False


def measured_only(cut, allowed=0.0, **_):
    return cut.measured + BACKWARD_ERROR, False


def not_amplified(cut, allowed=0.0, *, weights=None, left=False):
    return HONEST(cut, allowed, left=left)


def as_right_ones(cut, allowed=0.0, *, weights=None, left=False):
    return HONEST(cut, allowed, weights=weights)


def silent(cut, allowed=0.0, **rest):
    return HONEST(cut, allowed, **rest)[0], False


def steady(numbers, k, widths, dominance):
    return replace(interpret(numbers, k, widths, dominance), turned=0.0, sensitivity=[0.0] * len(widths))


def flat(tasks, roots, sides, cuts, fixed, tolerance):
    return CERTIFICATE(tasks, roots, sides, [], 1e-12, tolerance)


def subspaces(problem):
    return judge_subspaces(problem, "exact")


def eigen(problem):
    return judge_tsv_merge(problem, "exact", "eigen")


def products(problem):
    return judge_tsv_merge(problem, "exact", "products")


def weighted_eigenvalues(problem):
    return judge_weighted(problem, "exact", np.random.default_rng(0))


def weighted_products(problem):
    return judge_weighted(problem, "exact", np.random.default_rng(0), "products")


MUTATIONS = {
    "no estimate": (Cut, "error", nothing, eigen),
    "no estimate of subspaces": (Cut, "error", nothing, subspaces),
    "rounding left out": (Cut, "error", measured_only, eigen),
    "rounding of subspaces left out": (Cut, "error", measured_only, subspaces),
    "no pairs measured": (eigenspaces, "_unresolved", lambda *_, **__: (0.0, 0.0), subspaces),
    "amplification left out": (Cut, "error", not_amplified, eigen),
    "left directions as right ones": (Cut, "error", as_right_ones, subspaces),
    "choices kept silent": (Cut, "error", silent, eigen),
    "weighted: no estimate": (weighted_eigen, "_certificate", flat, weighted_eigenvalues),
    "weighted products: no estimate": (weighted, "accuracy_of_whole", lambda *_: GOOD, weighted_products),
    "products: turning left out": (products_merge, "interpret", steady, products),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_estimate_is_found_out(name):
    owner, attribute, wrong, judge = MUTATIONS[name]
    with patch.object(owner, attribute, wrong), sizes(small=True):
        for seed in range(1500):
            try:
                found = judge(problem(np.random.default_rng(seed)))
            except ConvergenceError:
                continue
            if found.outcome == "dishonest":
                return
    pytest.fail("the judge found nothing")


@pytest.mark.exhaustive
def test_the_program_of_make_fuzz(tmp_path):
    root, file = Path(__file__).resolve().parents[2], tmp_path / "honesty.json"
    command = [sys.executable, "-m", "benchmarks.honesty", "--minutes", "0.1", "--processes", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["metric"] for row in json.loads(file.read_text())["rows"]} >= {"calls", "judged", "dishonest"}
