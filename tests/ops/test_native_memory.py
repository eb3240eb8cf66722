"""What the native CPU kernels do with memory that is not as they would like it: odd addresses, or none left."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compare import same_bits
from variants import DTYPES, available

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.ops import (
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    magnitude_ranks,
    magnitude_select,
    ranked_mask,
    reweight_prune,
    task_gram,
    task_spread,
    task_statistics,
)

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("g++") or shutil.which("c++")
native_backend = pytest.mark.parametrize("backend", available("cpu"))


def at_an_odd_address(tensor):
    memory = bytearray(tensor.numel() * tensor.element_size() + 16)
    odd = 1 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=odd).view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() % 2 == 1
    return copy


@native_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_odd_addresses(backend, dtype):
    """Code for aligned elements may do anything with them; a sanitizer reports the first access."""
    base, x, y = torch.randn(3, 40, 301).to(dtype).unbind()
    plain, odd = (base, [x, y]), (at_an_odd_address(base), [at_an_odd_address(x), at_an_odd_address(y)])
    summary = task_statistics(*plain)
    probabilities = della_probabilities(301, 0.5, 0.3)
    ranks = [magnitude_ranks(t, base=base) for t in (x, y)]

    def ranked(place):
        return [
            Sparsifier(ranked=RankedSparsifier(place(r), probabilities), seed=1, substream=t)
            for t, r in enumerate(ranks)
        ]

    ops = {
        "statistics": lambda b, t, _: task_statistics(b, t, backend=backend).sd,
        "ranks": lambda b, t, _: magnitude_ranks(t[0], backend=backend),
        "threshold": lambda b, t, _: magnitude_select(t[0], 100, backend=backend).threshold,
        "gram": lambda b, t, _: task_gram(t, base=b, backend=backend),
        "spread": lambda b, t, _: task_spread(b, t, backend=backend),
        "ranked mask": lambda b, t, _: ranked_mask(t[0], probabilities, seed=1, base=b, backend=backend),
        "pruned": lambda b, t, _: reweight_prune(b, t, summary, density=0.3, backend=backend)[1],
        "elected": lambda b, t, place: elect_and_sum(
            b, t, [1.0, 0.5], elect="sum", sparsifiers=ranked(place), backend=backend
        ),
    }
    for name, op in ops.items():
        assert same_bits(op(*odd, at_an_odd_address), op(*plain, lambda r: r)), name


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
    """On its way out of a parallel region it would end the process."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [CXX, "-std=c++17", "-fopenmp", f"-I{ROOT / 'csrc' / 'cpu'}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "caught after 100 calls")
