"""What a method declares about its memory, measured."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from merging import tasks_of

from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.methods import METHODS, Job

TASKS = 3
SLACK = 2 << 20  # threads, caches of libraries

# Options that take more than the defaults.
OPTIONS = {
    **{name: {} for name in sorted(METHODS)},
    "ties": {"density": 0.3},
    "breadcrumbs_ties": {"density": 0.3, "rescale": True},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.3},
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.5},
}

PROGRAM = """
import json, sys
sys.path[:0] = ["benchmarks", "tests"]
import torch
from memory import peak_of
from merging import group, tasks_of
from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.methods import Job, get_method

found = {}
for name, options in json.loads(sys.argv[1]).items():
    method, tasks = get_method(name), tasks_of(name, int(sys.argv[2]))
    parameters = MergeConfig.from_kwargs(name, **options).options(tasks, "w")
    method.run(*group((64, 48), tasks, torch.bfloat16), parameters)
    base, tuned = group((2048, 640), tasks, torch.bfloat16)
    _, peak = peak_of(lambda: method.run(base, tuned, parameters))
    found[name] = peak, method.cost(Job(tuple(base.shape), tasks, 4), parameters).bytes
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_below_what_is_declared():
    # Every block in pages of its own: what was freed is not there to be used again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", PROGRAM, json.dumps(OPTIONS), str(TASKS)]
    run = subprocess.run(program, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    found = json.loads(run.stdout)
    assert found.keys() == METHODS.keys()
    exceeded = {name: numbers for name, numbers in found.items() if numbers[0] > numbers[1] + SLACK}
    assert not exceeded


@pytest.mark.parametrize("method", sorted(METHODS))
def test_operations_are_counted(method):
    tasks = tasks_of(method, TASKS)
    options = MergeConfig(merge_method=method).options(tasks)
    small, large = (METHODS[method].cost(Job((rows, 64), tasks, 4), options) for rows in (64, 128))
    assert 0 < small.flops < large.flops and 0 < small.bytes <= large.bytes
