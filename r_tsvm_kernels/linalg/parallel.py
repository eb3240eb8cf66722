"""Concurrent decompositions: two on one core each finish sooner than two in sequence on both cores."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    for first in range(0, len(jobs), threads):
        wave = jobs[first : first + threads]  # if the last jobs are fewer, each gets more threads
        results += _run_wave(wave, threads) if len(wave) > 1 else [job() for job in wave]
    return results


def _run_wave(jobs: Sequence[Callable[[], T]], threads: int) -> list[T]:

    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(job: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return job()

    try:
        share = threads // len(jobs)
        with ThreadPoolExecutor(len(jobs), initializer=torch.set_num_threads, initargs=(share,)) as pool:
            running = [pool.submit(contextvars.copy_context().run, run, job) for job in jobs]
            return [future.result() for future in running]
    finally:
        torch.set_num_threads(threads)  # sets the number for new threads; this thread's number has not changed
