import subprocess
import sys
import threading
import time

import pytest
import torch
from variants import torch_threads

from r_tsvm_kernels import dispatch
from r_tsvm_kernels.errors import ConvergenceError
from r_tsvm_kernels.linalg import leading_subspaces, tsv_merge
from r_tsvm_kernels.linalg.parallel import run_concurrently

CPU = torch.device("cpu")


def test_results_in_order_and_threads_shared():
    with torch_threads(4):
        jobs = [lambda: (1, torch.get_num_threads()), lambda: (2, torch.get_num_threads())]
        assert run_concurrently(jobs, 999, CPU) == [(1, 2), (2, 2)]
        assert torch.get_num_threads() == 4
        assert run_concurrently([torch.get_num_threads] * 3, 999, CPU) == [1, 1, 1]
        assert run_concurrently([torch.get_num_threads] * 9, 999, CPU) == [1] * 9
        assert run_concurrently([torch.get_num_threads] * 2, 5, CPU) == [4, 4]  # too small
        assert run_concurrently([], 999, CPU) == []


def test_threads_are_kept_but_not_by_a_fork(monkeypatch):
    both = threading.Barrier(2, timeout=60)

    def thread():
        both.wait()  # so that no thread does both jobs
        return threading.get_ident()

    with torch_threads(2):
        first, again = (set(run_concurrently([thread] * 2, 999, CPU)) for _ in range(2))
        assert first == again
        monkeypatch.setattr("os.getpid", lambda: -1)  # a fork has another number, and none of the threads
        assert first.isdisjoint(run_concurrently([thread] * 2, 999, CPU))


def test_jobs_see_the_callers_context():
    def context():
        backend = dispatch.select("task_statistics", torch.zeros(1)).__module__.rpartition(".")[2]
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), backend

    with torch_threads(2), torch.inference_mode(), dispatch.use_backend(task_statistics="torch"):
        assert run_concurrently([context] * 2, 999, CPU) == [(False, True, "reference")] * 2
    with torch_threads(2), torch.no_grad():
        assert [found[:2] for found in run_concurrently([context] * 2, 999, CPU)] == [(False, False)] * 2


def test_an_error_comes_through():
    def fail():
        raise ConvergenceError("no")

    with torch_threads(2):
        ended = []
        with pytest.raises(ConvergenceError, match="no"):
            run_concurrently([fail, lambda: time.sleep(0.1) or ended.append(1)], 999, CPU)
        assert ended  # nothing is left running
        assert torch.get_num_threads() == 2


INTERRUPT = """
import signal, threading, time, torch
from r_tsvm_kernels.linalg.parallel import run_concurrently
torch.set_num_threads(2)
ended = []
threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
try:
    run_concurrently([lambda: time.sleep(1) or ended.append(1)] * 2, 999, torch.device("cpu"))
except KeyboardInterrupt:
    print("interrupted", ended)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_an_interrupt_waits_for_jobs_that_run():
    ran = subprocess.run([sys.executable, "-c", INTERRUPT], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "interrupted [1, 1]\n"


def test_the_solver_gives_the_same_result():
    matrices = [torch.randn(300, 280) for _ in range(3)]
    alone, parts = tsv_merge(matrices, [90, 70, 50]), leading_subspaces(matrices, [9, 7, 5])
    with torch_threads(3), torch.inference_mode():
        together, others = tsv_merge(matrices, [90, 70, 50]), leading_subspaces(matrices, [9, 7, 5])
    assert torch.allclose(alone.matrix, together.matrix, atol=1e-5)
    for part, other in zip(parts, others, strict=True):
        assert torch.allclose(part.U @ part.core @ part.Vh, other.U @ other.core @ other.Vh, atol=1e-9)
