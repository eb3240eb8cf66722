"""Merges from parts as an algorithm of FusionBench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, auto_register_config
from fusion_bench.mixins import LightningFabricMixin
from torch import nn

from ...errors import ConfigError
from ...loaded_parts import Parts
from . import INSTALLATION
from .algorithm import METADATA, filled, plain


@auto_register_config
class PartsAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Give the pretrained model of a pool the merged weights of any task weights, without a decomposition.

    Base and parts are read from disk, one tensor at a time; the pool gives the module, and its other models are not
    loaded. Merging takes place on the device of FusionBench's Fabric.

    Args:
        parts: the folder that `decompose_checkpoints` wrote.
        base: the base; None means the one of the decomposed recipe.
        weights: by task, or one for each; tasks that are not named keep the weight of the recipe.
        alpha: of the merge; None keeps that of the recipe.
        rank: largest rank of parts that are stored as factors; None uses all of them.

    Raises:
        ConfigError: an unknown argument, or no folder of parts is given.
    """

    def __init__(
        self,
        parts: str | None = None,
        base: str | None = None,
        weights: Mapping[str, Any] | Sequence[Any] | None = None,
        alpha: Any = None,
        rank: int | None = None,
        **metadata: Any,
    ) -> None:
        if unknown := sorted(metadata.keys() - METADATA):
            raise ConfigError(f"unknown key {unknown[0]!r}; the keys are parts, base, weights, alpha and rank")
        if not parts:
            raise ConfigError("parts: name the folder that `rtsvm decompose` wrote, as in method.parts=PATH")
        super().__init__(**metadata)

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module]) -> nn.Module:
        """Merge and return the pretrained model of the pool; a copy of it if the pool holds modules, not recipes.

        Tensors that the base on disk does not have, such as the head of a classifier, keep the pool's values.

        Raises:
            ConfigError: no such task, a value out of range, or the pool has no pretrained model.
            CheckpointError, ShapeError: parts or base are missing or damaged, or do not fit the pretrained model.
            NonFiniteError: a part holds NaN or infinity, or a merged value overflows its dtype.
            ConvergenceError: the weights make the parts cancel each other.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        if not pool.has_pretrained:
            raise ConfigError("the pool has no model named _pretrained_, which gets the merged weights; add it")
        weights, alpha = plain(self.weights), plain(self.alpha)
        parts = Parts.load(self.parts, base=self.base, rank=self.rank)
        parts.recipe(weights, alpha)  # report mistakes before any model is loaded
        model: nn.Module | LazyStateDict = pool.load_pretrained_model()
        if isinstance(model, LazyStateDict):
            model = filled(model.meta_module, {name: model[name] for name in model})
        elif pool.has_instance_models:
            model = deepcopy(model)
        parts.apply_(model, weights, alpha, device=self.fabric.device)
        INSTALLATION.count("parts")
        return model
