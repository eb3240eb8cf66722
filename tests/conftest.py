"""Fixtures: one seed, poisoned memory, and really trained checkpoints."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The workers share the cores; more threads than cores make small decompositions many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Deterministic algorithms, below, want it on a GPU: without it torch warns at every product, and warnings are errors.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tests name the backends they run, whether or not these pass a self-check, and read nothing from the user's cache.
os.environ["RTSVM_SELFCHECK"] = "off"

import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # compare, oracle, variants, ...: helpers of the tests

# Programs that a script starts in the background ignore interrupts, and so would those that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Fixtures here set up a backend, which is the same for each example.
QUIET = [HealthCheck.function_scoped_fixture]
settings.register_profile("default", deadline=None, max_examples=40, print_blob=True, suppress_health_check=QUIET)
settings.register_profile("quick", settings.get_profile("default"), max_examples=4)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    """Leave the tests that take longest to `make test-all`, which begins with the longest: no core idles at the end."""
    if "RTSVM_TEST_ALL" not in os.environ:
        skip = pytest.mark.skip(reason="left to make test-all (RTSVM_TEST_ALL=1): takes long")
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(skip)
    else:
        items.sort(key=lambda item: "test_every_launch" not in item.name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised tensors with NaN, so that unwritten output is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder: a base and three experts that were really trained (quickly), and four merges."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "trained"
    with FileLock(shared / "trained.lock"):  # one worker trains for all
        if not (out / "results.json").is_file():
            program = [sys.executable, str(ROOT / "examples" / "digits_demo.py"), "--quick", "--out", str(out)]
            subprocess.run(program, check=True, capture_output=True, timeout=300)
    return out
