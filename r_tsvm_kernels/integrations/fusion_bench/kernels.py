"""FusionBench's TSVM, Iso-C, Iso-CTS and TIES with our solvers and kernels.

Each function takes the FusionBench function that it replaces, and then the arguments of that function, which it calls
for inputs that we do not handle.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from fusion_bench.method.isotropic_merging import iso_utils
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.ties_merging import ties_merging_utils
from torch import Tensor

from ...config import MergeConfig
from ...errors import ConvergenceError, NonFiniteError
from ...merge import merge_tensors
from ...ops import MagnitudeSelection, Sparsifier, elect_and_sum, magnitude_select
from . import INSTALLATION

TaskVector = Mapping[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # FusionBench merges float64 more accurately than we promise
DEVICES = ("cpu", "cuda")


def tsvm(
    theirs: Callable[..., Any],
    task_vectors: Sequence[TaskVector],
    exclude_keys: Sequence[str] | None = None,
    accelerator: Any = None,
    return_single_task_models: bool = False,
) -> Any:
    """TSV-Merge of task vectors."""
    accelerator = accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"exclude_keys": exclude_keys, "accelerator": accelerator}
    if return_single_task_models:
        return theirs(task_vectors, **options, return_single_task_models=True)
    return _merged("tsvm", {}, partial(theirs, **options), task_vectors, **options)


def iso_c(
    theirs: Callable[..., Any],
    task_vectors: Sequence[TaskVector],
    accelerator: Any = "cuda",
    exclude_keys: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Iso-C of task vectors."""
    options = {"exclude_keys": exclude_keys, "accelerator": accelerator}
    return _merged("iso_c", {}, partial(theirs, **options), task_vectors, **options)


def iso_cts(
    theirs: Callable[..., Any],
    task_vectors: Sequence[TaskVector],
    common_space_fraction: float,
    accelerator: Any = "cuda",
    exclude_keys: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Iso-CTS of task vectors."""
    options = {"exclude_keys": exclude_keys, "accelerator": accelerator}
    theirs = partial(theirs, common_space_fraction=common_space_fraction, **options)
    return _merged("iso_cts", {"common_space_fraction": common_space_fraction}, theirs, task_vectors, **options)


def _merged(
    method: str,
    parameters: dict[str, Any],
    theirs: Callable[..., dict[str, Tensor]],
    task_vectors: Sequence[TaskVector],
    exclude_keys: Sequence[str] | None,
    accelerator: Any,
) -> dict[str, Tensor]:
    """Merge by our method of that name, one tensor at a time; call `theirs` for tensors that it does not handle."""
    patterns = [glob.escape(key) for key in exclude_keys or ()]  # theirs are names, ours are patterns
    config = MergeConfig(method, exclude_keys=patterns, **parameters)
    merged = {}
    for name, first in task_vectors[0].items():
        result = None
        if first.dtype in DTYPES and torch.device(accelerator).type in DEVICES:
            tensors = [vector[name].to(accelerator) for vector in task_vectors]
            try:
                result = merge_tensors(torch.zeros_like(tensors[0]), tensors, config, name=name).weight
                INSTALLATION.count(method)
            except (NonFiniteError, ConvergenceError):
                pass
        if result is None:
            result = theirs([{name: vector[name]} for vector in task_vectors])[name]
        merged[name] = result.to(first.device)
    return merged


def ties_merging(
    theirs: Callable[..., Tensor], flat_task_checks: Tensor, reset_thresh: float | None = None, merge_func: str = ""
) -> Tensor:
    """TIES of task vectors (T, D), over the whole model at once.

    Like FusionBench it keeps one element more than the share of D, and all that are equal to the smallest of these.
    Where the sum of an element is 0, it elects the sign that more elements have, and - if there is none.
    """
    leave = partial(theirs, flat_task_checks, reset_thresh=reset_thresh, merge_func=merge_func)
    how = merge_func.split("-")[-1]
    fits = flat_task_checks.dtype in DTYPES and flat_task_checks.device.type in DEVICES
    differentiated = torch.is_grad_enabled() and flat_task_checks.requires_grad
    if not fits or differentiated or how not in ("sum", "mean") or reset_thresh is None or flat_task_checks.ndim != 2:
        return leave()
    size = flat_task_checks.shape[1]
    kept = int(size * (reset_thresh / 100 if reset_thresh > 1 else reset_thresh)) + 1
    if not 1 <= kept <= size:
        return leave()
    tasks = list(flat_task_checks)
    try:
        thresholds = [magnitude_select(task, kept).threshold for task in tasks]
    except NonFiniteError:
        return leave()
    all_ties = torch.tensor(size, device=flat_task_checks.device)
    sparsifiers = [Sparsifier(largest=MagnitudeSelection(threshold, all_ties)) for threshold in thresholds]
    zeros = flat_task_checks.new_zeros(size)
    total = elect_and_sum(zeros, tasks, 1.0, sparsifiers=sparsifiers)
    # Our kernel elects + where the sum is 0. To elect - there, all task vectors change their sign.
    sign = 1.0 if float(total.sign_().sum(dtype=torch.float64)) > 0 else -1.0
    del total
    mean = how == "mean"
    INSTALLATION.count("elect_and_sum")
    merged = elect_and_sum(
        zeros, tasks, sign, elect="sum", normalize=mean, alpha=1.0 if mean else sign, sparsifiers=sparsifiers
    )
    return merged if mean else merged.to(flat_task_checks.dtype)  # their mean is float32 as well


REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (TSVM_utils, "compute_and_sum_svd_mem_reduction", tsvm),
    (iso_utils, "iso_c", iso_c),
    (iso_utils, "iso_cts", iso_cts),
    (ties_merging_utils, "ties_merging", ties_merging),
]


class Patches:
    """Replaces FusionBench's functions by ours in every module of FusionBench that refers to them."""

    def __init__(self) -> None:
        # All functions are looked up before any is replaced.
        originals = [(getattr(module, name), ours) for module, name, ours in REPLACEMENTS]
        self._pairs = [(theirs, _standing_in(ours, theirs)) for theirs, ours in originals]
        for theirs, ours in self._pairs:
            _replace(theirs, ours)

    def undo(self) -> None:
        """Restore FusionBench's functions, also in modules that were imported in the meantime."""
        for theirs, ours in self._pairs:
            _replace(ours, theirs)


def _standing_in(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(theirs)(partial(ours, theirs))


def _replace(old: object, new: object) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "fusion_bench":
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)
