"""Upper limits of the work that solver `products` gives a GPU, so that it does not grow unnoticed."""

import pytest

from benchmarks.gpu_work import work_of

# Shape, then fp16 and float64 in TFLOP, launches and waits; of a flat spectrum, which is solved once.
LIMITS = {
    ("tsv_merge", (1024, 4096)): (1.1, 0.03, 7_000, 12),
    ("weighted_merge", (1024, 1024)): (0.4, 0.02, 1_000, 20),
}


@pytest.mark.parametrize(("name", "shape"), LIMITS)
def test_work_stays_within_limits(name, shape):
    work, error = work_of(name, shape, "flat")
    assert error < 1e-4
    found = work.operations["fp16"] / 1e12, work.operations["float64"] / 1e12, sum(work.launches.values()), work.waits
    for value, limit in zip(found, LIMITS[name, shape], strict=True):
        assert limit / 2 < value <= limit
