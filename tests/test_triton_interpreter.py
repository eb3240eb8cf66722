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


# A test per file: they share the cores.
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests" / "ops").glob("test_triton*.py")))
def test_the_kernels_in_the_interpreter(file: str):
    # Without the plugins of the parent: no worker of its own.
    plugins = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, f"tests/ops/{file}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-1000:]
    assert "skipped" not in done.stdout
