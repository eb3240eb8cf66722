"""Kill sweeps with SIGKILL at random moments and run them again; prints what happened as JSON.

A program of its own, which forks before torch has any threads: a child starts in milliseconds. Arguments: a folder with
`in` (a base and two fine-tunes) and `eval.sh`, number of kills, seed, number of jobs, and the method: `tsvm`, whose
candidates share parts, or `ties`, whose candidates share an update.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from r_tsvm_kernels import MergeConfig, sweep_checkpoints
from r_tsvm_kernels.sweep import commands

folder, kills, rng, jobs = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])), int(sys.argv[4])
models = [str(folder / "in" / name) for name in ("expert0", "expert1")]
method = sys.argv[5]
grids = {"alpha": "0.2:0.8:0.2", **({"mode": "exact,fast"} if method == "tsvm" else {"density": "0.3,0.6"})}
config = MergeConfig(method, base_model=str(folder / "in" / "base"), models=models)
torch.set_num_threads(1)


def sweep(out, stop_after=None):
    """Sweep in a child; kill it after some seconds. Return its exit status (None if it was killed) and its time."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        commands.GRACE_SECONDS = 1.0
        try:
            evaluate = f"sh {folder}/eval.sh {{model}} {out}.log"
            result = sweep_checkpoints(config, out, evaluate=evaluate, grids=grids, jobs=jobs)
            os._exit(0 if result.complete and result.total == 8 else 3)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(4)
    if stop_after is not None:
        time.sleep(stop_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), time.perf_counter() - start


def main():
    code, whole = sweep(folder / "whole")
    rounds, hits = [], 0
    while hits < kills:
        out = folder / f"killed{len(rounds)}"
        killed = []
        for _ in range(1 + len(rounds) % 4):  # some that go on are killed as well
            killed.append(sweep(out, rng.uniform(0, whole))[0] is None)
        hits += sum(killed)
        rounds.append({"out": str(out), "killed": sum(killed), "code": sweep(out)[0]})
    json.dump({"code": code, "rounds": rounds}, sys.stdout)


main()
