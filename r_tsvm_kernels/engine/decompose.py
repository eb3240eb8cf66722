"""`decompose_checkpoints`: from a recipe to a folder of parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError
from ..files import write_json, write_text
from ..parts import require_linear
from ..parts_folder import PARTS_FILE, TensorParts, content_of
from ..plan import Decomposition, make_plan, tasks_of
from .job import MergeJob
from .journal import Finished, as_report
from .output import is_single_file
from .run import CheckpointResult, Progress, Run


def decompose_checkpoints(
    config: MergeConfig | str | Path,
    out: str | Path,
    *,
    dense_above: int | None = None,
    store_dtype: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: str | int | None = None,
    device_memory: str | int | None = None,
    allow_pickle: bool = False,
    resume: bool = False,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CheckpointResult:
    """Decompose the checkpoints a recipe names, once, for merges with any weights and alpha.

    The update of `tsvm`, `rtsvm`, `star` and `core_space` is ``alpha * sum_t w_t M_t``, where the purified task vectors
    M_t do not depend on the weights w_t. This writes them: one safetensors file for each task, and ``parts.json``. A
    recipe with ``parts`` then merges at the speed of task arithmetic. It streams, resumes and is verified like
    `merge_checkpoints`.

    Args:
        config: recipe, or the path of its YAML file. Its weights and alpha are only defaults of later merges.
        out: a folder that does not exist or is empty.
        dense_above: mean rank of the tasks above which the M_t of a tensor are stored as matrices: merges then read
            more and compute less; 0 means all. By default they are factors of rank k_t where these are smaller.
        store_dtype: dtype of the parts; None means float32, which adds an error of some 4e-8, or bfloat16 (2e-3) with
            ``mode: fast``; float64 for float64 models. What rounding added is in the report.
        device: as for `merge_checkpoints`.
        threads: as for `merge_checkpoints`.
        memory: as for `merge_checkpoints`.
        device_memory: as for `merge_checkpoints`.
        allow_pickle: as for `merge_checkpoints`.
        resume: as for `merge_checkpoints`.
        restart: as for `merge_checkpoints`.
        progress: as for `merge_checkpoints`.

    Returns:
        CheckpointResult with the folder, and a report per tensor: of the merge with weights 1.

    Raises:
        ConfigError: the merge of the recipe is not linear in the weights; or as `merge_checkpoints`.
        RtsvmError: as `merge_checkpoints`.

    Examples:
        >>> from safetensors.torch import save_file
        >>> from r_tsvm_kernels import merge_checkpoints
        >>> for seed, name in enumerate(("base", "math", "code")):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     save_file({"w": torch.randn(12, 8, generator=generator)}, f"{name}.safetensors")
        >>> recipe = MergeConfig("tsvm", base_model="base.safetensors", models=["math.safetensors", "code.safetensors"])
        >>> decompose_checkpoints(recipe, "parts").reports["w"].ranks
        [4, 4]
        >>> merged = merge_checkpoints(recipe.model_copy(update={"parts": "parts"}), "merged")
        >>> merged.reports["w"].certificate
        Certificate(svd-float64, error ... ok)
    """
    config, out = config if isinstance(config, MergeConfig) else MergeConfig.from_yaml(config), Path(out)
    if is_single_file(out):
        raise ConfigError(f"{out}: parts are a folder, with a file for each task; leave out .safetensors")
    if config.parts is not None:
        raise ConfigError(f"parts: {config.parts} is decomposed already; leave it out of the recipe")
    require_linear(config)
    run = Run.given(
        out,
        device=device,
        threads=threads,
        memory=memory,
        device_memory=device_memory,
        resume=resume,
        restart=restart,
        progress=progress,
    )
    how = Decomposition(dense_above, store_dtype)
    return run.carry_out(
        make_plan(config, 2**63, allow_pickle=allow_pickle, decomposition=how), lambda job: None, _complete
    )


def _complete(job: MergeJob) -> None:
    """Write ``parts.json`` and the recipe."""
    plan, folder = job.plan, job.stage.folder
    tensors = {name: _facts(job, job.finished[name]) for name in plan.tensors}
    recipe = {"merge_method": plan.config.merge_method, **plan.config.model_dump(mode="json", exclude_defaults=True)}
    write_json(folder / PARTS_FILE, content_of(recipe, tasks_of(plan.config), tensors, __version__))
    write_text(folder / "merge_recipe.yaml", plan.config.to_yaml())


def _facts(job: MergeJob, finished: Finished) -> TensorParts:
    """Return what merges need to know of a tensor."""
    tensor, report = job.plan.tensors[finished.name], as_report(finished.report)
    linear = job.plan.config.method.linear
    if tensor.stored_parts is None or linear is None:
        raise CheckpointError(f"{finished.name}: was not decomposed")
    sums = {own.name: own.checksum for own in finished.stored}
    tasks = [task.name for task in tasks_of(job.plan.config)] if tensor.stored_parts.kind != "base" else []
    certificate = None if report.certificate is None else {**finished.report["certificate"]}
    return TensorParts(
        kind=tensor.stored_parts.kind,
        shape=tensor.spec.shape,
        base=finished.inputs[0],
        checksums=tuple(tuple(own for name, own in sums.items() if name.startswith(f"{task}/")) for task in tasks),
        treatment=report.treatment,
        reason=report.reason,
        ranks=tuple(report.ranks),
        products=tuple(map(tuple, report.part_products)),
        error=report.part_error,
        spread=linear.spread(len(job.plan.tuned), tensor.options),
        rounding=tuple(report.part_rounding),
        certificate=certificate,
    )
