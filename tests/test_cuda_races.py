"""The CUDA kernels, a real thread for every CUDA thread, under the thread sanitizer (tests/cuda_on_cpu/races.py)."""

import os
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest

ROOT = Path(__file__).resolve().parents[1]


def runtime() -> str:
    """Return the compiler's library of the thread sanitizer, or nothing."""
    if emulated_cuda.CXX is None:
        return ""
    query = [emulated_cuda.CXX, "-print-file-name=libtsan.so"]
    path = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    return path if Path(path).is_absolute() else ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RTSVM_SANITIZED" not in os.environ, reason="takes a minute: run by make test-sanitized"),
    pytest.mark.skipif(not runtime(), reason="no C++ compiler on PATH with the thread sanitizer's library"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    module = emulated_cuda.build(tmp_path_factory.mktemp("cuda_threads"), threads=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime(), "TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    program = [sys.executable, str(ROOT / "tests/cuda_on_cpu/races.py"), str(module)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    sys.stderr.write(done.stderr[-20_000:])  # pytest shows it with a failure
    return dict(line.split(": ") for line in done.stdout.splitlines())


def test_no_kernel_races_and_all_are_right(lines):
    assert lines["all"] == "ok", lines
    assert {result for name, result in lines.items() if "float" in name} == {"right"}


def test_every_barrier_is_missed(lines):
    """Without it the sanitizer reports: the emulation sees what it is for, and no barrier is superfluous."""
    missed = {name: result for name, result in lines.items() if name.startswith("without")}
    assert len(missed) > 10
    assert set(missed.values()) == {"race"}, missed
