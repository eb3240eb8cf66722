"""Concurrent decompositions: two on one core each finish sooner than two in sequence on both cores."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

# From this many rows on, the decomposition of a square matrix takes longer than starting a thread.
WORTH_A_THREAD = 128


def run_concurrently(jobs: Sequence[Callable[[], T]], size: int, device: torch.device) -> list[T]:
    """Run the jobs and return their results in order; on a CPU at the same time, sharing torch's threads.

    LAPACK's eigenvalue routines spend half of their time in matrix-vector products and in waits for their threads;
    whole matrices parallelise better.

    Args:
        jobs: independent of each other.
        size: of the matrices they decompose; small ones run in sequence.
        device: where they compute; on devices other than a CPU they run in sequence.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or size < WORTH_A_THREAD:
        return [job() for job in jobs]
    results: list[T] = []
    left = list(jobs)
    while left:
        # Fewer jobs than threads would share them badly. They run with jobs before them, and the system takes turns:
        # three decompositions on two threads take 0.95 to 1 of the time.
        count = threads if len(left) >= 2 * threads else len(left)
        wave, left = left[:count], left[count:]
        results += _run_wave(wave, threads) if len(wave) > 1 else [job() for job in wave]
    return results


def _run_wave(jobs: Sequence[Callable[[], T]], threads: int) -> list[T]:
    share = max(1, threads // len(jobs))
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(job: Callable[[], T]) -> T:
        torch.set_num_threads(share)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return job()

    pool = _pool(len(jobs), share, os.getpid())
    running = [pool.submit(contextvars.copy_context().run, run, job) for job in jobs]
    try:
        wait(running)
        return [future.result() for future in running]
    finally:
        for future in running:
            future.cancel()
        wait(running)  # after an interrupt; nothing must be left running
        torch.set_num_threads(threads)  # sets the number for new threads; this thread's number has not changed


@cache
def _pool(workers: int, share: int, process: int) -> ThreadPoolExecutor:
    """Return threads that are kept, because new ones must allocate the buffers of MKL again.

    Jobs of one pool never wait for jobs of the same one: theirs have a smaller share.

    Args:
        workers: number of threads.
        share: threads of torch that each job has.
        process: that starts the threads; a fork has none of them.
    """
    return ThreadPoolExecutor(workers)
