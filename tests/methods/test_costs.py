"""What a method declares about its memory, measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging import tasks_of
from safetensors.torch import save_file

from r_tsvm_kernels import MergeConfig, backends, use_backend
from r_tsvm_kernels.dispatch import chosen, ops
from r_tsvm_kernels.engine.scheduling import make_schedule
from r_tsvm_kernels.methods import METHODS, TensorJob
from r_tsvm_kernels.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
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
    "della_linear": {"density": 0.3, "rescale": False},
    "sce": {"select_topk": 0.5},
    "rtsvm": {"density": 0.3},
}
# Backends that are forced, for all ops and for single ones: the plan must be that of what runs.
ELEMENT_WISE = sorted(name for name, method in METHODS.items() if not method.matrices_only)
SPECTRAL = sorted(METHODS.keys() - ELEMENT_WISE)
IN_TORCH = {"pcb"}  # element-wise; what PyTorch needs for it is more than any addition
REFERENCES = dict.fromkeys(ops(), "torch")
MIXED = {op: "torch" for op in ops() if op != "elect_and_sum"}


def long(choice, methods, name):
    return pytest.param(choice, methods, id=name, marks=pytest.mark.exhaustive)


# Spectral methods take longest, and forced references hardly change what they need.
CHOICES = [
    pytest.param({}, [*ELEMENT_WISE, "core_space", "rtsvm", "tsvm"], id="automatic"),
    long({}, SPECTRAL, "automatic, spectral"),
    pytest.param(REFERENCES, ELEMENT_WISE, id="torch"),
    long(REFERENCES, SPECTRAL, "torch, spectral"),
    long(MIXED, ELEMENT_WISE, "torch except sums"),
]

PROGRAM = """
import json, sys
from contextlib import nullcontext
sys.path[:0] = ["tests"]
import torch
from r_tsvm_kernels.bench.measure import peak_of
from merging import group, tasks_of
from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.methods import TensorJob, get_method

found = {}
use = use_backend(**json.loads(sys.argv[3]))
use.__enter__()
for name, options in json.loads(sys.argv[1]).items():
    method, tasks = get_method(name), tasks_of(name, int(sys.argv[2]))
    parameters = MergeConfig(name, **options).options(tasks, "w")
    method.run(*group((64, 48), tasks, torch.bfloat16), parameters)
    base, tuned = group((2048, 640), tasks, torch.bfloat16)
    _, peak = peak_of(lambda: method.run(base, tuned, parameters))
    found[name] = peak, method.cost(TensorJob(tuple(base.shape), tasks, 4), parameters).bytes
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("choice", "methods"), CHOICES)
def test_memory_stays_below_what_is_declared(choice, methods):
    # Every block has its own pages, so freed memory is not used again.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    options = {name: OPTIONS[name] for name in methods}
    program = [sys.executable, "-c", PROGRAM, json.dumps(options), str(TASKS), json.dumps(choice)]
    run = subprocess.run(program, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    found = json.loads(run.stdout)
    assert sorted(found) == sorted(methods)
    exceeded = {name: numbers for name, numbers in found.items() if numbers[0] > numbers[1] + SLACK}
    assert not exceeded


READINGS = """
import json, sys
from contextlib import nullcontext
sys.path[:0] = ["tests"]
import torch
from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.bench.measure import peak_of
from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.methods import TensorJob, get_method
from r_tsvm_kernels.methods.rtsvm_readings import needs_torch, prepared_bytes, prepared_in_torch
from merging import group, lapack_alone

found, (own, whole) = [], json.loads(sys.argv[1])
for forced in ({}, {"magnitude_select": "torch"}):
    with use_backend(**forced):
        for options in own:
            for dtype in (torch.bfloat16, torch.float64):
                parameters = MergeConfig("rtsvm", **options).options(3)
                assert needs_torch(parameters)
                prepared_in_torch(*group((64, 48), 3, dtype), parameters)
                base, tuned = group((2048, 640), 3, dtype)
                _, peak = peak_of(lambda: prepared_in_torch(base, tuned, parameters))
                found.append((peak, prepared_bytes(TensorJob((2048, 640), 3, max(4, dtype.itemsize)))))
for native, options in [(native, options) for native in (False, True) for options in whole]:
    method, parameters = get_method("rtsvm"), MergeConfig("rtsvm", **options).options(3)
    method.run(*group((64, 48), 3, torch.bfloat16), parameters)
    base, tuned = group((1024, 640), 3, torch.bfloat16)
    with nullcontext() if native else lapack_alone():
        result, peak = peak_of(lambda: method.run(base, tuned, parameters))
    assert sum(result.report.ranks) <= 640
    found.append((peak, method.cost(TensorJob((1024, 640), 3, 4), parameters).bytes))
print(json.dumps(found))
"""


# Only Linux has /proc, from which the peak memory of the process is read.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_of_the_readings_of_rtsvm_stays_below_what_is_declared():
    own = [
        {"outlier_statistic": "signed"},
        {"outlier_weighting": "keep", "outlier_sigma": 0.0, "prune_first": True, "density": 0.3},
        {"sparsity_scope": "consensus", "outlier_statistic": "signed", "outlier_weighting": "remove", "density": 0.5},
        {"pruning": "threshold"},
    ]
    whole = [
        {"rank": "shared", "density": [1.0, 0.05, 0.05]},
        {"rank": "shared", "rank_rho": -2.0, "sparsity_eps": 0.5},
        {"rank": [0.5, 300, "sparsity_power"], "prune_first": True},
        {"rank_rho": -1.0, "density": 0.3},
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", READINGS, json.dumps([own, whole])]
    run = subprocess.run(program, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    found = json.loads(run.stdout)
    assert len(found) == 2 * 2 * len(own) + 2 * len(whole)
    assert all(bound / 3 < peak for peak, bound in found[: -len(whole)]), found
    assert all(peak < bound + SLACK for peak, bound in found), found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_plan_follows_the_backend_that_is_forced(method):
    """Where a kernel stores less than the reference, forcing the reference raises the declared memory, and nothing else
    does."""
    options = MergeConfig(method).options(tasks_of(method, TASKS))
    job = TensorJob((2048, 640), tasks_of(method, TASKS), 4)
    automatic = METHODS[method].cost(job, options).bytes
    with use_backend("torch"):
        reference = METHODS[method].cost(job, options).bytes
    native = backends.state("cpu") == backends.READY
    has_kernels = method in ELEMENT_WISE and METHODS[method].ops and method not in IN_TORCH
    assert reference > automatic if native and has_kernels else reference == automatic
    assert METHODS[method].cost(job, options).bytes == automatic


def test_a_plan_of_a_checkpoint_follows_the_backend_that_is_forced(tmp_path):
    tensors = {f"layers.{layer}.weight": torch.randn(64, 48) for layer in range(2)}
    for name in ("base", "tuned"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    base, tuned = (str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    recipe = MergeConfig("ties", base_model=base, models=[{"model": tuned}], parameters={"density": 0.3})
    needs = {}
    for backend in ("torch", "cpu"):
        with use_backend(backend):
            needs[backend] = make_schedule(make_plan(recipe, 2**40), 1, None, None, on_gpu=False).tensors
            assert all(name == backend for name in [chosen("elect_and_sum", "cpu"), chosen("magnitude_select", "cpu")])
    name = next(iter(tensors))
    assert needs["torch"][name].work > needs["cpu"][name].work


@pytest.mark.parametrize("method", sorted(METHODS))
def test_operations_are_counted(method):
    tasks = tasks_of(method, TASKS)
    options = MergeConfig(merge_method=method).options(tasks)
    small, large = (METHODS[method].cost(TensorJob((rows, 64), tasks, 4), options) for rows in (64, 128))
    assert 0 < small.flops < large.flops and 0 < small.bytes <= large.bytes
