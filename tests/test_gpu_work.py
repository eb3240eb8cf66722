"""Upper limits of the work that solver `products` gives a GPU, so that it does not grow unnoticed."""

import pytest

from benchmarks.gpu_work import work_of

# Shape and spectrum, then fp16 and float64 in TFLOP, launches, those with CUDA graphs, and waits.
LIMITS = {
    ("tsv_merge", (4096, 4096), "flat"): (38, 0.6, 2_200, 1_150, 6),
    ("tsv_merge", (4096, 4096), "power 0.5"): (36, 1.3, 2_500, 1_100, 6),
    ("weighted_merge", (1024, 1024), "flat"): (0.4, 0.02, 800, 650, 20),
    ("weighted_merge", (1024, 4096), "flat"): (1.7, 0.06, 2_600, 1_700, 28),
}


@pytest.mark.parametrize(("name", "shape", "kind"), LIMITS)
def test_work_stays_within_limits(name, shape, kind):
    work, error = work_of(name, shape, kind)
    assert error < 2e-4  # all was resolved; a merge of so small flat matrices would go on to another solver
    found = (
        work.operations["fp16"] / 1e12,
        work.operations["float64"] / 1e12,
        sum(work.launches.values()),
        sum(work.replayed.values()),
        work.waits,
    )
    for value, limit in zip(found, LIMITS[name, shape, kind], strict=True):
        assert limit / 2 < value <= limit, found
