"""Parts in memory: merge them into state dicts and modules, again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import checksum
from .config import MergeConfig
from .engine import choose_device
from .errors import ConfigError
from .lora.adapted_model import AdaptedModel
from .lora.task_part import TaskPart
from .module_tensors import tensors_of
from .parts import certified, merge_parts
from .parts_folder import PartsFolder
from .plan import MergePlan, make_plan
from .values import stored

Weights = Mapping[str, Any] | Sequence[Any] | None


class Parts:
    """The parts of a merge that `decompose_checkpoints` wrote, with the base; made by `load`.

    Tensors are read from disk one at a time, so that memory holds one tensor with its parts beside what is returned.

    Attributes:
        tasks: names of the tasks, to which weights are given.
        config: the recipe that was decomposed, with its weights and alpha.

    Examples:
        >>> from safetensors.torch import save_file
        >>> from r_tsvm_kernels import decompose_checkpoints
        >>> for seed, name in enumerate(("base", "math", "code")):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     save_file({"weight": torch.randn(12, 8, generator=generator)}, f"{name}.safetensors")
        >>> recipe = MergeConfig("tsvm", base_model="base.safetensors", models=["math.safetensors", "code.safetensors"])
        >>> result = decompose_checkpoints(recipe, "task_parts")
        >>> parts = Parts.load("task_parts")
        >>> module = torch.nn.Linear(8, 12, bias=False)
        >>> parts.apply_(module, {"math": 0.8, "code": -0.5}, alpha=1.2)
        >>> parts.restore_(module)  # the base again, to the bit
    """

    def __init__(self, config: MergeConfig, folder: PartsFolder, allow_pickle: bool) -> None:
        self.config = config
        self.tasks = tuple(task.name for task in folder.tasks)
        self._folder, self._allow_pickle = folder, allow_pickle
        self._last: tuple[MergeConfig, MergePlan] | None = None
        self._checked = set[str]()  # tensors whose base and parts had the checksums of the decomposition

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        rank: int | None = None,
        allow_pickle: bool = False,
    ) -> Parts:
        """Open a folder of parts and its base.

        Args:
            folder: what `decompose_checkpoints` wrote.
            base: the base; None means the one of the recipe.
            rank: largest rank of parts that are stored as factors; None uses all of them.
            allow_pickle: read a base that exists only as pickle.

        Raises:
            CheckpointError: the folder or the base is missing or damaged, or they do not belong together. Values are
                compared when a tensor is merged first.
            ConfigError: the rank is not a positive number.
        """
        opened = PartsFolder.open(folder)
        changes: dict[str, Any] = {"parts": str(folder), "parts_rank": rank}
        if base is not None:
            changes["base_model"] = str(base)
        recipe = MergeConfig.from_dict(opened.recipe)
        fields = {name: getattr(recipe, name) for name in MergeConfig.model_fields}
        parts = cls(MergeConfig(**fields | changes), opened, allow_pickle)
        parts._plan(parts.config)
        return parts

    def recipe(self, weights: Weights = None, alpha: Any = None) -> MergeConfig:
        """Return the recipe of a merge from the parts, for `merge_checkpoints`.

        Args:
            weights: by task, or one for each; None, and tasks that are not named, keep those of the recipe. A weight
                may also be a gradient or a list of filters, as in recipes.
            alpha: of the merge; None keeps that of the recipe.

        Raises:
            ConfigError: there is no such task, another number of weights, or a value is not valid.
        """
        if weights is not None and not isinstance(weights, Mapping):
            given = list(weights) if isinstance(weights, Iterable) and not isinstance(weights, str) else [weights]
            if len(given) != len(self.tasks):
                raise ConfigError(f"weights: expected one for each of {', '.join(self.tasks)}, got {len(given)}")
            weights = dict(zip(self.tasks, given, strict=True))
        entries = list(self.config.models)
        for task, weight in (weights or {}).items():
            index = self._folder.index_of(task)
            parameters = {**entries[index].parameters, "weight": _plain(weight)}
            entries[index] = entries[index].model_copy(update={"parameters": parameters})
        parameters = {key: value for key, value in self.config.parameters.items() if alpha is None or key != "lambda"}
        changed = parameters if alpha is None else {**parameters, "alpha": _plain(alpha)}
        fields = {name: getattr(self.config, name) for name in MergeConfig.model_fields}
        return MergeConfig(**{**fields, "models": tuple(entries), "parameters": changed})

    def state_dict(
        self, weights: Weights = None, alpha: Any = None, *, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return the merged model.

        Args:
            weights: as for `recipe`.
            alpha: as for `recipe`.
            device: of the tensors; merging takes place there.

        Raises:
            ConfigError: as `recipe`.
            DeviceError: no such device.
            CheckpointError, NonFiniteError, ConvergenceError: as `merge_checkpoints`.
        """
        plan, target = self._plan(self.recipe(weights, alpha)), choose_device(str(device))
        return {name: self._merged(plan, name, target, plan.tensors[name].spec.dtype) for name in plan.tensors}

    def apply_(
        self,
        module: nn.Module,
        weights: Weights = None,
        alpha: Any = None,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        """Give a module the weights of the merged model, in place and in its dtypes.

        Every call starts from the base on disk, so that nothing drifts. The module, and the accuracy of the merge, are
        checked before anything is changed. After another error, such as a value that overflows, some tensors are merged
        and the others are as before: merge again, or call `restore_`.

        Args:
            module: with the parameters and buffers of the base.
            weights: as for `recipe`.
            alpha: as for `recipe`.
            device: merging takes place there; None means the device of each tensor of the module.

        Raises:
            CheckpointError, ShapeError: the module has no such tensor, or one of another shape; or it ties tensors that
                the base does not tie.
            DTypeError, DeviceError: a tensor of the module cannot hold the values: integers or packed values instead of
                floats, a copy or a view with less memory, or the meta device.
            ConfigError, NonFiniteError, ConvergenceError: as `state_dict`.
        """
        plan = self._plan(self.recipe(weights, alpha))
        target = None if device is None else choose_device(str(device))
        own = tensors_of(module, plan, self._folder)
        for name in own:
            self._check_accuracy(plan, name)
        for name, tensor in own.items():
            tensor.copy_(self._merged(plan, name, target or tensor.device, tensor.dtype))

    def restore_(self, module: nn.Module) -> None:
        """Give a module the weights of the base again, in place and to the bit.

        Raises:
            CheckpointError, ShapeError, DTypeError, DeviceError: as `apply_`.
        """
        plan = self._plan(self.config)
        for name, tensor in tensors_of(module, plan, self._folder).items():
            tensor.copy_(stored(self._base(plan, name), tensor.dtype, name))

    def _plan(self, config: MergeConfig) -> MergePlan:
        """Return the plan of a recipe; that of the last one is kept."""
        if self._last is None or self._last[0] != config:
            self._last = config, make_plan(config, 2**63, allow_pickle=self._allow_pickle)
        return self._last[1]

    def _base(self, plan: MergePlan, name: str) -> Tensor:
        """Read a tensor of the base, and compare it with the one that was decomposed, once."""
        values = plan.base.load(name)
        if name not in self._checked:
            self._folder.check_base(name, checksum(values), plan.base.path)
        return values

    def _check_accuracy(self, plan: MergePlan, name: str) -> None:
        """Require the certificate of a merged tensor to be met, as `merge_parts` does."""
        planned, facts = plan.tensors[name], self._folder.tensors[name].cut(plan.config.parts_rank)
        if planned.treatment.kind != "base":
            wide = plan.config.dtype == "float64" or torch.float64 in planned.dtypes
            certified(facts, planned.options, torch.float64 if wide else torch.float32, name)

    @torch.no_grad()
    def _merged(self, plan: MergePlan, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        base, planned = self._base(plan, name), plan.tensors[name]
        if planned.treatment.kind == "base":
            return (stored(base, dtype, name) if base.is_floating_point() else base).to(device)
        models = [model.adapter for model in plan.tuned if isinstance(model, AdaptedModel)]
        check = name not in self._checked
        parts = [part.part(name, check=check).to(device) for part in models if isinstance(part, TaskPart)]
        self._checked.add(name)
        facts = self._folder.tensors[name].cut(plan.config.parts_rank)
        rounded = None if plan.config.dtype is None else getattr(torch, plan.config.dtype)
        method = plan.config.method.name
        return merge_parts(
            base.to(device), parts, facts, planned.options, dtype, method=method, name=name, dtype=rounded
        ).weight


def _plain(value: Any) -> Any:
    """Return what a search draws, such as a scalar or vector of NumPy or torch, in Python's own types."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value
