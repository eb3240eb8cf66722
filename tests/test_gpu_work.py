"""Upper limits of the work that solver `products` gives a GPU, so that it does not grow unnoticed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="counts launches of Triton, which is not installed")
# Shape, spectrum and layers in a batch, then fp16 and float64 in TFLOP, launches, those with CUDA graphs, and waits.
LIMITS = {
    ("tsv_merge", (4096, 4096), "flat", 1): (35, 0.3, 2_000, 1_000, 5),
    ("tsv_merge", (4096, 4096), "power 0.5", 1): (33, 0.9, 2_400, 1_000, 5),
    ("tsv_merge", (1024, 4096), "flat", 2): (2, 0.04, 1_900, 1_000, 5),
    ("weighted_merge", (1024, 1024), "flat", 1): (0.4, 0.02, 800, 650, 20),
    ("weighted_merge", (1024, 4096), "flat", 1): (1.65, 0.05, 2_500, 1_600, 28),
}
COUNT = """
import json, sys
from benchmarks.gpu_work import work_of

work, error = work_of(*json.loads(sys.argv[1]))
operations = [work.operations[kind] / 1e12 for kind in ("fp16", "float64")]
print(json.dumps([error, *operations, sum(work.launches.values()), sum(work.replayed.values()), work.waits]))
"""


@pytest.mark.parametrize(
    ("name", "shape", "kind", "layers"),
    [pytest.param(*case, marks=[pytest.mark.exhaustive] * (case[-1] > 1)) for case in LIMITS],
)
def test_work_stays_within_limits(name, shape, kind, layers):
    # In a process of its own: Triton's interpreter would launch more, and take minutes.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, json.dumps([name, shape, kind, layers])]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    error, *found = json.loads(done.stdout)
    assert error < 2e-4  # all was resolved; a merge of so small flat matrices would go on to another solver
    for value, limit in zip(found, LIMITS[name, shape, kind, layers], strict=True):
        assert limit / 2 < value <= limit, found
