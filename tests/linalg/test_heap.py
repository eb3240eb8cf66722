import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from r_tsvm_kernels.linalg.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def touch():  # 20 MiB in blocks of 4
    return [torch.ones(1 << 20) for _ in range(5)]
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc learns from freed blocks")
def test_freed_memory_is_taken_again_without_page_faults(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    run = [sys.executable, "-c", FAULTS]
    kept, given_back = (
        int(subprocess.run([*run, word], capture_output=True, text=True, check=True, timeout=60).stdout)
        for word in ("keep", "give back")
    )
    assert kept < given_back / 4
