"""The native CPU module if it cannot continue: statistics of other tasks, no free memory."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from variants import some_backends

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.ops import reweight_prune, task_statistics

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("g++") or shutil.which("c++")
native_backend = some_backends(task_statistics, "cpu")


@native_backend
def test_statistics_of_other_tasks_are_refused(backend):
    """Kernels look up the bound of every task there."""
    base, tuned = torch.zeros(9, 9), [torch.randn(9, 9), torch.randn(9, 9)]
    summary = task_statistics(base, tuned[:1])
    with pytest.raises(ConfigError, match="of the 2 tasks, got those of 1"):
        reweight_prune(base, tuned, summary, backend=backend)


PROGRAM = """
#include <atomic>
#include <cstdio>
#include <new>

#include "parallel.h"

int main() {
  std::atomic<int> calls{0};
  try {
    r_tsvm::parallel_for(100, 1 << 20, 4, [&](int64_t unit) {
      ++calls;
      if (unit % 10 == 3) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    std::printf("caught after %d calls", calls.load());
  }
}
"""


@pytest.mark.skipif(CXX is None, reason="compiles a program: no C++ compiler on PATH")
def test_an_allocation_that_fails_in_a_thread_is_an_exception(tmp_path):
    """If it left a parallel region it would end the process."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [CXX, "-std=c++17", "-fopenmp", f"-I{ROOT / 'csrc' / 'cpu'}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "caught after 100 calls")
