"""Kill merges with SIGKILL at random moments and resume them; prints what happened as JSON.

A program of its own, which forks before torch has any threads: a child starts in milliseconds, so that many are killed
in little time. Arguments: folder with `base` and `tuned`, number of kills, seed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from r_tsvm_kernels import MergeConfig, merge_checkpoints
from r_tsvm_kernels.engine import job
from r_tsvm_kernels.engine.journal import Journal

folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
config = MergeConfig(base_model=str(folder / "base"), models=({"model": str(folder / "tuned")},))
torch.set_num_threads(2)


def merge(out, *, commit_seconds, stop_after=None):
    """Merge in a child; kill it after some seconds. Return its exit status (None if it was killed) and its time."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        job.COMMIT_SECONDS = commit_seconds
        try:
            result = merge_checkpoints(config, out, resume=True, shard_size="60KB")
            os._exit(0 if (out / "merge_report.json").exists() and result.path == out else 3)
        finally:
            os._exit(4)
    if stop_after is not None:
        time.sleep(stop_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), seconds


def finished(out):
    """How many tensors the journal of a merge that was stopped has."""
    journal = Journal.open(out.with_name(f".{out.name}.partial") / "merge_journal.jsonl")
    return len(journal.finished) if journal else 0


def main():
    codes = [merge(folder / f"whole{i}", commit_seconds=0.0) for i in range(3)]
    whole = sorted(seconds for _, seconds in codes)[1]
    rounds, hits = [], 0
    while hits < kills:
        number = len(rounds)
        out = folder / f"killed{number}"
        commit_seconds = 0.0 if number % 4 else 0.05
        killed, journaled = [], []
        for _ in range(1 + number % 3):  # some resumptions are killed as well
            code, _ = merge(out, commit_seconds=commit_seconds, stop_after=rng.uniform(0, whole))
            killed.append(code is None)
            journaled.append(None if out.exists() else finished(out))
        hits += sum(killed)
        code, _ = merge(out, commit_seconds=commit_seconds)
        leftovers = sorted(path.name for path in folder.iterdir() if path.name.startswith(f".{out.name}"))
        rounds.append({"killed": killed, "journaled": journaled, "code": code, "leftovers": leftovers})
    json.dump({"codes": [code for code, _ in codes], "rounds": rounds}, sys.stdout)


main()
