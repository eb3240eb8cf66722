"""Extract an adapter from a fine-tune: the truncated SVD of every matrix that changed, one at a time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..config import MergeConfig, ModelEntry, as_dtype
from ..engine import Progress, choose_device
from ..engine.tiles import check_copies
from ..errors import ConfigError, NonFiniteError
from ..linalg import Factored, leading_triplets, truncated_svd
from ..linalg.decompositions import frobenius_norm
from ..lora import from_triplets, is_head, rank_of, transposed
from ..lora.adapted_model import AdaptedModel
from ..lora.task_part import TaskPart
from ..ops._checks import is_finite
from ..plan import MergePlan, TensorPlan, make_plan
from ..text import dtype_name, printable
from .output import AdapterResult, LeftOut, ModuleReport, adapter_output, finish

_LOG = logging.getLogger(__name__)

# mergekit-extract-lora's default.
DEFAULT_RANK = 128

# Last parts of the names of embeddings, which PEFT adapts in a form of their own. An output head may share the first
# ones, those of tokens.
_TOKEN_EMBEDDINGS = {
    "embed_tokens", "embed_in", "wte", "shared", "word_embeddings", "token_embedding", "tok_embeddings", "embeddings",
}  # fmt: skip
_EMBEDDINGS = _TOKEN_EMBEDDINGS | {
    "wpe", "position_embedding", "position_embeddings", "token_type_embeddings", "embed_positions",
    "relative_attention_bias", "rel_embeddings", "embed_tokens_per_layer",
}  # fmt: skip
# Model types with weights stored (in, out).
_FAN_IN_FAN_OUT = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}

# Modules that PEFT refuses to adapt, by the type of the model: kernels use their weights, or their class is no layer.
_MAMBA = {key: {"out_proj", "conv1d"} for key in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")}
_NOT_ADAPTED = _MAMBA | {"gpt_oss": {"router"}}

# Task vectors are formed in pieces of about this size.
_PIECE_BYTES = 64 << 20


def extract_lora(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    embed_lora: bool = False,
    fan_in_fan_out: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out_dtype: torch.dtype | str = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Turn a fine-tune into a LoRA adapter: the truncated SVD of every matrix that changed.

    One tensor is in memory at a time. The adapter appears in `out` when it is complete.

    Args:
        base: the model that was fine-tuned: folder, .safetensors file or Hugging Face id.
        model: the fine-tune, or the parts of a task (``PARTS/TASK.safetensors``), whose own ranks are the default.
        out: a folder that does not exist yet or is empty.
        rank: largest rank; None means 128, or no limit if `energy` or `noise` is given.
        energy: per matrix the smallest rank that holds this share of the change's squared Frobenius norm.
        noise: per matrix the number of singular values above the noise edge (Gavish and Donoho, 2014).
        embed_lora: adapt embeddings and output head too.
        fan_in_fan_out: weights are stored (in, out); None decides by the base's ``model_type``.
        include: patterns (with ``*``) of tensor names to adapt; empty means all.
        exclude: patterns of tensor names not to adapt.
        out_dtype: dtype of the factors, a `torch.dtype` or its name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each tensor.

    Raises:
        ConfigError, DeviceError, OutputExistsError, OutputBusyError, OutputUnfinishedError: the request cannot be
            carried out.
        CheckpointError, ShapeError, DTypeError, NonFiniteError, ConvergenceError: an input is damaged, or the two do
            not match, or are equal.
        DiskFullError: there is no space for the output.
    """
    start, target, dtype = time.perf_counter(), choose_device(device), as_dtype(out_dtype)
    base, model = str(base), str(model)
    rank_of((1, 1), rank, energy, noise)  # refuse values out of range before anything is read
    config = MergeConfig(
        merge_method="task_arithmetic",
        base_model=base,
        models=(ModelEntry(model=model),),
        include=tuple(include),
        exclude=tuple(exclude),
    )
    plan = make_plan(config, 2**63)
    part = plan.tuned[0].adapter if isinstance(plan.tuned[0], AdaptedModel) else None
    if part is not None and not isinstance(part, TaskPart):
        raise ConfigError(f"{model}: is a LoRA adapter already; to cut it to a smaller rank, use resize-lora")
    if rank is None and energy is None and not noise and part is None:
        rank = DEFAULT_RANK
    for note in plan.notes:
        _LOG.warning("%s", printable(note))
    check_copies(plan)
    if fan_in_fan_out is None:
        fan_in_fan_out = plan.base.config.get("model_type") in _FAN_IN_FAN_OUT
    sizes = {name: tensor.bytes_read for name, tensor in plan.tensors.items()}
    # Configs omit defaults of their model class.
    untied = any(is_head(name.removesuffix(".weight")) for name in plan.tensors)
    tied = bool(plan.base.config.get("tie_word_embeddings", not untied))
    with adapter_output(out, dtype, sizes, progress) as output:
        for name, tensor in plan.tensors.items():
            beside = "of a module beside the one that an adapter belongs to" if plan.base.module(name).prefix else ""
            reason = beside or _not_expressible(tensor, embed_lora, tied, plan.base.config.get("model_type"))
            if reason:
                norm = 0.0
                if part is not None:
                    norm = _norm_of_part(part, name)
                elif _comparable(plan, name):
                    squares = (float(piece.square().sum()) for _, piece in _task_vector(plan, name, torch.float64))
                    norm = math.sqrt(sum(squares))
                output.left_out[name] = LeftOut(reason, norm)
                if tensor.treatment.kind != "base" and not math.isfinite(output.left_out[name].norm):
                    raise _not_finite(name)
            else:
                m, n = tensor.spec.shape
                wanted = rank_of((m, n), rank, energy, noise)
                if part is None:
                    update, report = _extracted(plan, name, wanted, target)
                else:
                    update, report = _cut(part, name, wanted, target)
                module, embedding = name.removesuffix(".weight"), _last_part(name) in _EMBEDDINGS
                turned = embedding or (fan_in_fan_out and not is_head(module))
                output.writer.add(module, transposed(update) if turned else update, embedding=embedding)
                output.modules[module] = report
            output.done(name)
        for checkpoint in plan.inputs:
            checkpoint.check_unchanged()
        architectures = plan.base.config.get("architectures") or [""]
        task_type = "CAUSAL_LM" if str(architectures[0]).endswith("ForCausalLM") else None
        output.writer.finish(base=base, task_type=task_type, fan_in_fan_out=fan_in_fan_out)
        request = {
            "base": base,
            "model": model,
            "rank": rank,
            "energy": energy,
            "noise": noise,
            "out_dtype": dtype_name(dtype),
        }
        return finish(output, Path(out), "extract-lora", request, start)


def _not_expressible(tensor: TensorPlan, embed_lora: bool, tied: bool, model_type: object) -> str:
    """Return the reason to leave a tensor out; empty if it is adapted."""
    name, module = tensor.name, _last_part(tensor.name)
    if tensor.treatment.kind == "base":
        return tensor.treatment.reason
    if len(tensor.spec.shape) != 2:
        return f"{len(tensor.spec.shape)}-D: LoRA adapts matrices"
    if not name.endswith(".weight"):
        return "not the weight of a module"
    if module in _NOT_ADAPTED.get(str(model_type), ()):
        return f"PEFT does not adapt {module} of models of type {model_type}"
    if not embed_lora and (module in _EMBEDDINGS or is_head(module)):
        return "embedding or output head; adapted with --embed-lora (embed_lora=True)"
    if tied and module in _TOKEN_EMBEDDINGS:
        return "embedding tied to the output head: PEFT would adapt one of the two"
    return ""


def _last_part(name: str) -> str:
    """Return the last part of a module's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _extracted(plan: MergePlan, name: str, rank: Any, device: torch.device) -> tuple[Factored, ModuleReport]:
    """Return the truncated SVD of a task vector."""
    m, n = plan.tensors[name].spec.shape
    dtype = torch.float64 if torch.float64 in plan.tensors[name].dtypes else torch.float32
    delta = torch.empty(m, n, dtype=dtype, device=device)
    for first, piece in _task_vector(plan, name, dtype):
        delta[first : first + len(piece)] = piece.to(device)
    if not is_finite(delta):
        raise _not_finite(name)
    return _truncated(delta, rank)


def _truncated(delta: Tensor, rank: Any) -> tuple[Factored, ModuleReport]:
    """Return the truncated SVD of a matrix."""
    # If the cut falls among nearly equal singular values, their vectors are ill-determined. Every choice retains the
    # same energy; the exact mode would compute a full SVD to decide.
    U, S, Vh = found = truncated_svd(delta, rank, mode="fast")
    update = from_triplets(U, S, Vh)
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    energy = min(1.0, float(S.square().sum()) / norm**2) if norm else 1.0
    return update, ModuleReport((delta.shape[0], delta.shape[1]), found.ranks[0], norm, energy, found.certificate)


def _cut(part: TaskPart, name: str, rank: Any, device: torch.device) -> tuple[Factored, ModuleReport]:
    """Return the part of a tensor at a lower rank."""
    found = part.part(name).to(device)
    if isinstance(found, Tensor):
        return _truncated(found, rank)
    U, S, Vh = triplets = leading_triplets(found, rank)
    update = from_triplets(U.float(), S.float(), Vh.float())
    return update, ModuleReport(found.shape, len(S), found.norm(), triplets.captured_energy, triplets.certificate)


def _norm_of_part(part: TaskPart, name: str) -> float:
    if name not in part.kinds:
        return 0.0
    found = part.part(name)
    return found.norm() if isinstance(found, Factored) else frobenius_norm(found)


def _not_finite(name: str) -> NonFiniteError:
    return NonFiniteError(
        f"{name}: a model holds NaN or infinity there, or the two differ by more than their dtype holds; "
        "repair the checkpoint or exclude the tensor"
    )


def _comparable(plan: MergePlan, name: str) -> bool:
    """Whether both models have the tensor, in one shape; an excluded one may differ."""
    shape = plan.tensors[name].spec.shape
    headers = [model.tensors.get(name) for model in plan.inputs if isinstance(model, Checkpoint)]
    return all(header is not None and header.shape == shape for header in headers)


def _task_vector(plan: MergePlan, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the task vector of a tensor in pieces of whole rows, each with the index of its first row."""
    shape = plan.tensors[name].spec.shape
    rows = shape[0] if shape else 1
    step = max(1, _PIECE_BYTES * max(rows, 1) // max(1, dtype.itemsize * math.prod(shape)))
    for first in range(0, rows, step):
        part = (first, min(first + step, rows)) if shape else None
        before, after = (
            model.load(name, rows=part).to(dtype) for model in plan.inputs if isinstance(model, Checkpoint)
        )
        yield first, after - before
