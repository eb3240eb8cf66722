import platform
import subprocess
import sys

import pytest

# Of 4 KiB, in the five blocks of 4 MiB that are written.
PAGES = 5 * 1024
FAULTS = """
import resource, torch
from r_tsvm_kernels.linalg.heap import keep_freed_memory
keep_freed_memory()
def touch():
    return [torch.ones(1 << 20) for _ in range(5)]
for _ in range(5):
    touch()  # glibc finds places for the blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc learns from freed blocks")
def test_freed_memory_is_taken_again_without_page_faults(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    run = [sys.executable, "-c", FAULTS]
    faults = int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert faults < 0.02 * 50 * PAGES  # without the call mostly 0.8 of all
