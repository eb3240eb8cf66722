"""The changes that an installation makes in mergekit, and their reversal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mergekit.sparsify
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge, register, registry, sce_merge
from mergekit.merge_methods.karcher import karcher_merge_method
from mergekit.merge_methods.model_stock import model_stock_merge_method
from mergekit.merge_methods.multislerp import multislerp
from mergekit.merge_methods.nuslerp import nuslerp_merge_method
from mergekit.merge_methods.slerp import slerp_merge_method
from mergekit.scripts.extract_lora import TaskVectorDecompositionTask

from ..installation import Replacements, falling_back
from . import decomposition, geometry, kernels, sce
from .methods import merge_methods

REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (mergekit.sparsify, "magnitude", kernels.magnitude),
    (mergekit.sparsify, "magnitude_outliers", kernels.magnitude_outliers),
    (mergekit.sparsify, "bernoulli", kernels.bernoulli),
    (mergekit.sparsify, "della_magprune", kernels.della_magprune),
    (GeneralizedTaskArithmeticMerge, "merge_group", kernels.merge_group),
    (sce_merge, "implementation", sce.sce),
    (model_stock_merge_method, "implementation", geometry.model_stock),
    (karcher_merge_method, "implementation", geometry.karcher),
    (multislerp, "implementation", geometry.multislerp),
    (nuslerp_merge_method, "implementation", geometry.nuslerp),
    (slerp_merge_method, "implementation", geometry.slerp),
    (TaskVectorDecompositionTask, "execute", decomposition.decompose),
]


class Patches:
    """Adds our methods to mergekit's registry, and replaces its functions by ours."""

    def __init__(self, accelerate: bool) -> None:
        self._replacements = Replacements(
            [(owner, name, falling_back(ours)) for owner, name, ours in (REPLACEMENTS if accelerate else [])]
        )
        self._methods = merge_methods()
        for method in self._methods:
            register(method)

    def undo(self) -> None:
        """Remove our methods, and restore mergekit's functions."""
        self._replacements.undo()
        for method in self._methods:
            registry._METHODS.pop(method.spec.name, None)  # no public function does this
