"""Our merge methods as an algorithm of FusionBench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, auto_register_config
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.models.utils import get_target_state_dict
from omegaconf import OmegaConf
from torch import Tensor, nn

from ...blocks import Shape
from ...config import MergeConfig, ModelEntry
from ...errors import CheckpointError, ConfigError
from ...merge import merge_tensors
from ...methods import TensorReport, nearest
from ...missing import without_base
from ...parameters import layer_positions
from ...quantised import refuse_quantised
from ...recipe_fields import Calibration, ConvChoice, RouterChoice
from ...tied import is_copy
from ...treatments import check_same_names, is_excluded
from . import INSTALLATION

METADATA = {"_recursive_", "_usage_", "_version_"}  # FusionBench's own


@auto_register_config
class MergeAlgorithm(LightningFabricMixin, BaseAlgorithm):
    """Merge the models of a pool by one of our methods, one tensor at a time, on the device of FusionBench's Fabric.

    Args:
        merge_method: name of one of our methods; see ``rtsvm info``.
        parameters: parameters of the method, as in a recipe: scalars, gradients over the layers or lists of filters.
        model_parameters: values for single models of the pool, by name, e.g. ``{math: {weight: 0.5}}``.
        include: patterns (with ``*``) of the tensors that take part; None means all.
        exclude: patterns of tensors that keep the pretrained model's values.
        router: what happens to the routers of mixtures of experts: ``merge``, ``base`` or ``mean``.
        conv: what spectral methods do with convolutions: ``mean`` or ``flatten``.
        split: sizes of the matrices in fused tensors, by patterns of names; or ``auto``.
        calibrate: ``svc`` calibrates the singular values of the merged change of each matrix; None does not.
        calibrate_floor: least response of a task that the calibration counts.

    Attributes:
        reports: reports of the last run, one per tensor.

    Raises:
        ConfigError: an unknown argument, method or parameter, or a value out of range.
    """

    def __init__(
        self,
        merge_method: str = "rtsvm",
        parameters: Mapping[str, Any] | None = None,
        model_parameters: Mapping[str, Mapping[str, Any]] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        router: RouterChoice = "merge",
        conv: ConvChoice = "mean",
        split: Mapping[str, Sequence[int]] | str | None = None,
        calibrate: Calibration | None = None,
        calibrate_floor: float = 0.1,
        **metadata: Any,
    ) -> None:
        if unknown := sorted(metadata.keys() - METADATA):
            raise ConfigError(f"unknown key {unknown[0]!r}; the method's parameters go under `parameters`")
        super().__init__(**metadata)
        self.reports: dict[str, TensorReport] = {}
        self.recipe(list(model_parameters or ()))  # report mistakes before any model is loaded

    def recipe(self, model_names: Sequence[str]) -> MergeConfig:
        """Return the recipe that merges the models of these names.

        Raises:
            ConfigError: as for the class; or `model_parameters` names another model.
        """
        own = plain(self.model_parameters) or {}
        if unknown := sorted(own.keys() - set(model_names)):
            advice = f"did you mean {nearest(unknown[0], model_names)!r}? " if model_names else ""
            raise ConfigError(f"model_parameters: no model {unknown[0]!r} in the pool; {advice}It has: {model_names}")
        return MergeConfig(
            merge_method=self.merge_method,
            models=tuple(ModelEntry(model=name, parameters=own.get(name) or {}) for name in model_names),
            parameters=plain(self.parameters) or {},
            include=tuple(self.include or ()),
            exclude=tuple(self.exclude or ()),
            router=self.router,
            conv=self.conv,
            split=plain(self.split) or {},
            calibrate=self.calibrate,
            calibrate_floor=self.calibrate_floor,
        )

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module]) -> nn.Module:
        """Merge and return the pretrained model of the pool; a copy of it if the pool holds modules, not recipes.

        A method that needs no base (`linear`) also merges pools without one. Integer buffers keep its values. Tensors
        that the pretrained model ties are merged once, and must be equal in every model.

        Raises:
            ConfigError: the pool has no pretrained model, and the method or its calibration needs one.
            QuantisedRefusedError: a model is quantised.
            CheckpointError, ShapeError, DTypeError: the models do not have the same tensors, or cannot be merged.
            NonFiniteError: a model holds NaN or infinity, or a merged value overflows its dtype.
            ConvergenceError: a decomposition failed or missed its certificate.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        names = list(pool.model_names)
        config = self.recipe(names)
        has_base = config.method.needs_base or pool.has_pretrained
        if has_base and not pool.has_pretrained:
            raise ConfigError(
                f"{config.merge_method} needs a pretrained model, and the pool has none: add _pretrained_ to its models"
            )
        config = config if has_base else without_base(config)
        base = pool.load_pretrained_model() if has_base else pool.load_pretrained_or_first_model()
        if pool.has_instance_models:
            base = deepcopy(base)
        start, tuned = _tensors(base), [_tensors(pool.load_model(name)) for name in names]
        refuse_quantised("the pretrained model", start)
        for name, tensors in zip(names, tuned, strict=True):
            refuse_quantised(name, tensors)
            # keys() of a lazy one is not a set
            check_same_names(dict.fromkeys(start), dict.fromkeys(tensors), name, config)

        device, positions, self.reports = self.fabric.device, layer_positions(start), {}
        merged: dict[str, Tensor] = {}
        written: dict[Any, str] = {}

        splits = config.splits({n: tuple(start[n].shape) for n in start} if config.split == "auto" else {})

        def shape_of(name: str) -> Shape | None:
            return tuple(start[name].shape) if name in start else None

        for name in sorted(start, reverse=True):  # of tied tensors, first the one whose name is used: see `tied_names`
            tensor = start[name]
            place = tensor.device, tensor.data_ptr(), tuple(tensor.shape)
            if tensor.numel() and place in written:  # tied to a tensor that was merged before
                if not is_excluded(config, name):
                    _check_tied(name, written[place], dict(zip(names, tuned, strict=True)))
                continue
            # Only excluded tensors may be missing. A lazy state dict has no get().
            own = [(tensors[name] if name in tensors else tensor).to(device) for tensors in tuned]  # noqa: SIM401
            blocks = config.blocks(name, tuple(tensor.shape), shape_of, splits)
            result = merge_tensors(tensor.to(device), own, config, name=name, position=positions[name], blocks=blocks)
            INSTALLATION.count(config.merge_method)
            self.reports[name] = result.report
            if isinstance(base, LazyStateDict):
                merged[name] = result.weight.to(tensor.device)
            else:
                tensor.copy_(result.weight)
                written[place] = name
        self.reports = {name: self.reports[name] for name in start if name in self.reports}
        return filled(base.meta_module, merged) if isinstance(base, LazyStateDict) else base


def _check_tied(name: str, first: str, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise `CheckpointError` if a model has two tensors where the pretrained one has two names for one."""
    for model, tensors in models.items():
        if not is_copy(tensors[first], tensors[name]):
            raise CheckpointError(
                f"{model}: the pretrained model ties {name} to {first}, but here the two differ; untie the pretrained "
                "model, or retie this one"
            )


def plain(value: Any) -> Any:
    """Return a value of a configuration in Python's own types."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _tensors(model: nn.Module | LazyStateDict) -> Mapping[str, Tensor]:
    """Return the tensors to merge: a module's own tensors, without a copy, or a lazy state dict that reads them."""
    tensors: Mapping[str, Tensor] = model if isinstance(model, LazyStateDict) else get_target_state_dict(model)
    return tensors


def filled(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Give a module on the meta device its tensors."""
    module = deepcopy(module)
    module.load_state_dict(tensors, strict=False, assign=True)
    tie_weights = getattr(module, "tie_weights", None)
    if callable(tie_weights):
        tie_weights()
    return module
