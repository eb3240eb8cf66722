"""tests/ops/test_triton*.py in a process of its own, where Triton interprets its kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.triton_state() != backends.READY, reason=f"triton: {backends.triton_state()}"),
]


ROOT = Path(__file__).resolve().parents[1]


# How many tests each file has at least; a test here for each, so that they share the cores.
FILES = {
    "test_cases.py": 1,
    "test_add_update.py": 5,
    "test_magnitude_select.py": 60,
    "test_reweight_prune.py": 30,
    "test_task_statistics.py": 50,
    "test_triton_merging.py": 1,
    "test_gemm3.py": 5,
    "test_split_planes.py": 5,
    "test_symm_gram.py": 5,
    "test_symm_square.py": 5,
    "test_elect_and_sum.py": 1,
    "test_magnitude_ranks.py": 30,
    "test_random_mask.py": 5,
    "test_ranked_mask.py": 5,
    "test_task_gram.py": 5,
    "test_task_spread.py": 5,
    "test_triton_offsets.py": 11,
}


def test_every_file_is_listed():
    assert {path.name for path in (ROOT / "tests" / "ops").glob("test_triton*.py")} < FILES.keys()


@pytest.mark.parametrize("file", FILES)
def test_the_kernels_in_the_interpreter(file: str):
    # Without the plugins of the parent: no worker of its own.
    plugins = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "-k", "triton and not device", f"tests/ops/{file}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= FILES[file], done.stdout[-1000:]
    assert "skipped" not in done.stdout
