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


def test_the_kernels_in_the_interpreter():
    root = Path(__file__).resolve().parents[1]
    # Without the plugins of the parent: no worker of its own.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        *sorted(path.relative_to(root).as_posix() for path in root.glob("tests/ops/test_triton*.py")),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 600, done.stdout[-1000:]
    assert "skipped" not in done.stdout
