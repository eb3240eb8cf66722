import math

import numpy as np
import pytest
import torch
from cases import check
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    every_backend,
    every_dtype,
    group,
    laid_out_groups,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels.errors import ConfigError, NonFiniteError
from r_tsvm_kernels.ops import magnitude_select, spread_mask, spread_select, task_spread

native_backend = some_backends(spread_select, "cpu")


def half(differing):
    return differing // 2


@every_backend(spread_select, reference=False)
def test_cases(backend):
    check(spread_select, backend)


@every_backend(spread_select)
@every_dtype
@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_selects_what_a_sort_of_the_variances_does(backend, dtype, tasks, share):
    base, tuned = group((17, 31) if simulated(backend) else (67, 131), [dtype] * (tasks + 1))
    tuned[1].view(-1)[:100] = tuned[0].view(-1)[:100]  # equal variances, or none
    spread = task_spread(base, tuned).flatten().cpu().numpy()
    counts = []

    def keep(differing):
        counts.append(differing)
        return math.ceil(share * differing)

    found = spread_select(base, tuned, keep, backend=backend)
    assert counts == [np.count_nonzero(spread)]
    kept = np.argsort(-spread, kind="stable")[: math.ceil(share * counts[0])]
    mask = spread_mask(base, tuned, found).flatten().cpu().numpy()
    assert sorted(kept) == list(np.flatnonzero(mask))


@every_backend(spread_select, reference=False)
@given(models=laid_out_groups(), share=st.floats(0, 1), threads=st.integers(1, 3))
def test_same_selection_as_of_the_spread(backend, models, share, threads):
    base, tuned = models
    with torch_threads(threads):
        found = spread_select(base, tuned, lambda differing: int(share * differing), backend=backend)
    spread = task_spread(base, tuned)
    wanted = magnitude_select(spread, int(share * int(spread.count_nonzero())))
    assert found.threshold.equal(wanted.threshold) and found.ties.equal(wanted.ties)


@native_backend
@pytest.mark.parametrize("bits", [1, 12, 40])
def test_large_tensors_with_many_or_few_equal_spreads(backend, bits):
    # Few values share their upper bits, or an eighth of all do: gathered, or counted digit by digit.
    generator = torch.Generator().manual_seed(bits)
    base = torch.zeros(700, 701, dtype=torch.float64)
    tuned = [1 + torch.randint(2**bits, base.shape, generator=generator).double() / 2**bits for _ in range(2)]
    spread = task_spread(base, tuned)
    for share in (0.001, 0.3, 0.999):
        kept = int(share * int(spread.count_nonzero()))
        found = spread_select(base, tuned, lambda differing, share=share: int(share * differing), backend=backend)
        ranked = spread.flatten().sort(descending=True).values
        assert float(found.threshold) == float(ranked[kept - 1])
        assert int(found.ties) == kept - int((spread > found.threshold).sum())


@every_backend(spread_select)
def test_nothing_is_selected_where_tasks_agree(backend):
    base, (one,) = group((6, 7), [torch.float32] * 2)
    found = spread_select(base, [one, one], lambda differing: differing, backend=backend)
    assert math.isinf(found.threshold) and found.ties == 0
    assert not spread_mask(base, [one, one], found).any()


@every_backend(spread_select)
def test_refuses_values_that_are_not_finite_before_it_asks_how_many_to_keep(backend):
    base, tuned = group((6, 7), [torch.float32] * 3)
    tuned[1][2, 3] = math.inf
    with pytest.raises(NonFiniteError, match="spread_select"):
        spread_select(base, tuned, lambda differing: pytest.fail("asked"), backend=backend)


@every_backend(spread_select)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (-1, "keep must return 0 to 42, got -1"),
        (43, "keep must return 0 to 42, got 43"),
        (1.5, "whole number, got 1.5"),
    ],
)
def test_refuses_a_count_that_cannot_be(backend, answer, message):
    base, tuned = group((6, 7), [torch.float32] * 3)
    with pytest.raises(ConfigError, match=message):
        spread_select(base, tuned, lambda differing: answer, backend=backend)


@native_backend
def test_errors_of_the_rule_come_through(backend):
    base, tuned = group((6, 7), [torch.float32] * 3)

    def fail(differing):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        spread_select(base, tuned, fail, backend=backend)
    assert spread_select(base, tuned, half, backend=backend).ties == 1
