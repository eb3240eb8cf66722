"""LoRA adapters as outputs: extracted from a fine-tune, cut to a smaller rank, merged; one module at a time."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint import AdaptedModel, Checkpoint, MergePlan, TensorPlan, make_plan
from ..checkpoint.adapter import WEIGHTS_FILE
from ..checkpoint.adapter_config import CONFIG_FILE
from ..config import DTypeName, MergeConfig, ModelEntry
from ..errors import ConfigError, NonFiniteError, OutputUnfinishedError
from ..linalg import Certificate, Factored, fixed_rank, merge_factored, truncated_svd, weighted_sum
from ..lora import (
    Adapter,
    AdapterWriter,
    common_base_layers,
    common_modules,
    from_triplets,
    is_head,
    rank_of,
    transposed,
    truncated,
)
from ..ops import normalized
from ..ops._checks import is_finite, numbers_of
from .output import is_single_file, locked_stage, writing
from .run import Progress, choose_device
from .sidecar_files import write_json
from .tiles import check_copies

AdapterMethod = Literal["tsvm", "linear", "task_arithmetic"]

REPORT = "lora_report.json"

# mergekit-extract-lora's default.
DEFAULT_RANK = 128

# Last parts of the names of embeddings, which PEFT adapts in a form of their own. The first are those of tokens, which
# an output head may share.
_TOKEN_EMBEDDINGS = {"embed_tokens", "embed_in", "wte", "shared", "word_embeddings", "token_embedding"}
_EMBEDDINGS = _TOKEN_EMBEDDINGS | {"wpe", "position_embedding", "position_embeddings", "token_type_embeddings"}
# Models whose weights are stored (in, out).
_FAN_IN_FAN_OUT = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}

# Task vectors are formed in pieces of about this size.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class ModuleReport:
    """One module of the adapter.

    Attributes:
        shape: of the weight for an extraction, else of ``B @ A``.
        rank: of the update that was written; 0 if it is zero, then the module is not in the adapter.
        norm: Frobenius norm of the update before it was cut to that rank.
        captured_energy: share of the squared norm that the rank holds.
        certificate: accuracy of the spectral solve; None where QR and a small SVD did it all.
        ranks: of a TSV-Merge, rank kept of each adapter that has the module.
        energies: of a TSV-Merge, captured energy of each.
    """

    shape: tuple[int, int]
    rank: int
    norm: float
    captured_energy: float
    certificate: Certificate | None = None
    ranks: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A tensor that an adapter cannot express, or was not asked to.

    Attributes:
        reason: why.
        norm: Frobenius norm of its change; 0.0 if nothing is lost.
    """

    reason: str
    norm: float


@dataclass(frozen=True)
class AdapterResult:
    """A finished adapter.

    Attributes:
        path: its folder.
        report_path: the JSON report in it.
        modules: by name.
        left_out: by name of the tensor; only an extraction leaves any out.
        seconds: wall time.
    """

    path: Path
    report_path: Path
    modules: dict[str, ModuleReport]
    left_out: dict[str, LeftOut]
    seconds: float

    @property
    def captured_energy(self) -> float:
        """Share of the squared norm of the whole change, of what was left out too, that the adapter holds."""
        return _captured(self.modules, self.left_out)


@dataclass
class _Output:
    """An adapter in the making: the writer, the bytes to read per tensor or module, and what the report will say."""

    writer: AdapterWriter
    sizes: dict[str, int]
    progress: Callable[[Progress], None] | None
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    _bytes_done: int = 0

    def done(self, name: str) -> None:
        self._bytes_done += self.sizes[name]
        if self.progress:
            done = len(self.modules) + len(self.left_out)
            self.progress(Progress(name, done, len(self.sizes), self._bytes_done, sum(self.sizes.values())))


def extract_lora(
    base: str,
    model: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    embed_lora: bool = False,
    fan_in_fan_out: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: DTypeName = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Turn a fine-tune into a LoRA adapter: the truncated SVD of every matrix that changed.

    One tensor is in memory at a time. The adapter appears in `out` when it is complete.

    Args:
        base: the model that was fine-tuned: folder, .safetensors file or Hugging Face id.
        model: the fine-tune.
        out: a folder that does not exist yet or is empty.
        rank: largest rank; None means 128, or no limit where `energy` or `noise` decides.
        energy: per matrix the smallest rank that holds this share of the change's squared Frobenius norm.
        noise: per matrix the number of singular values above the noise edge (Gavish and Donoho, 2014).
        embed_lora: adapt embeddings and output head too.
        fan_in_fan_out: weights are stored (in, out); None decides by the base's ``model_type``.
        include: patterns (with ``*``) of tensor names to adapt; empty means all.
        exclude: patterns of tensor names not to adapt.
        dtype: of the factors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each tensor.

    Raises:
        ConfigError, DeviceError, OutputExistsError, OutputBusyError, OutputUnfinishedError: the request cannot be
            carried out.
        CheckpointError, ShapeError, DTypeError, NonFiniteError, ConvergenceError: an input is damaged, or the two do
            not fit together; or they are equal.
        DiskFullError: there is no room for the output.
    """
    start, target = time.perf_counter(), choose_device(device)
    rank_of((1, 1), rank, energy, noise)  # refuses what is out of range before anything is read
    if rank is None and energy is None and not noise:
        rank = DEFAULT_RANK
    config = MergeConfig(
        merge_method="task_arithmetic",
        base_model=base,
        models=(ModelEntry(model=model),),
        include=tuple(include),
        exclude=tuple(exclude),
    )
    plan = make_plan(config, 2**63)
    if isinstance(plan.tuned[0], AdaptedModel):
        raise ConfigError(f"{model}: is a LoRA adapter already; to cut it to a smaller rank, use resize-lora")
    check_copies(plan)
    if fan_in_fan_out is None:
        fan_in_fan_out = plan.base.config.get("model_type") in _FAN_IN_FAN_OUT
    sizes = {name: tensor.bytes_read for name, tensor in plan.tensors.items()}
    # Configs leave out what is the default of their model class.
    untied = any(is_head(name.removesuffix(".weight")) for name in plan.tensors)
    tied = bool(plan.base.config.get("tie_word_embeddings", not untied))
    with _output(out, dtype, sizes, progress) as output:
        for name, tensor in plan.tensors.items():
            beside = "of a module beside the one that an adapter belongs to" if plan.base.module(name).prefix else ""
            reason = beside or _not_expressible(tensor, embed_lora, tied)
            if reason:
                squares = (float(piece.square().sum()) for _, piece in _task_vector(plan, name, torch.float64))
                output.left_out[name] = LeftOut(reason, math.sqrt(sum(squares)))
                if tensor.treatment.kind != "base" and not math.isfinite(output.left_out[name].norm):
                    raise _not_finite(name)
            else:
                m, n = tensor.spec.shape
                update, report = _extracted(plan, name, rank_of((m, n), rank, energy, noise), target)
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
        request = {"base": base, "model": model, "rank": rank, "energy": energy, "noise": noise, "dtype": dtype}
        return _finish(output, Path(out), "extract-lora", request, start)


def resize_lora(
    adapter: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: DTypeName = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Cut an adapter to a smaller rank: the best approximation of every update, from QR and a small SVD.

    Args:
        adapter: folder or Hugging Face id.
        out: a folder that does not exist yet or is empty.
        rank: largest rank; None means no limit.
        energy: per module the smallest rank that holds this share of the update's squared Frobenius norm.
        dtype: of the factors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each module.

    Raises:
        As `merge_lora`.
    """
    start, target = time.perf_counter(), choose_device(device)
    if rank is None and energy is None:
        raise ConfigError("say how far to cut: a rank, or a share of the energy")
    rank_of((1, 1), rank, energy)
    source = Adapter(adapter)
    with _output(out, dtype, _sizes([source]), progress) as output:
        for name, module in source.modules.items():
            update, report = _cut(source.load(name, target), rank, energy)
            output.writer.add(name, update, embedding=module.embedding)
            output.modules[name] = report
            output.done(name)
        _finish_like(output, [source])
        request = {"adapter": adapter, "rank": rank, "energy": energy, "dtype": dtype}
        return _finish(output, Path(out), "resize-lora", request, start)


def merge_lora(
    adapters: Sequence[str],
    out: str | Path,
    *,
    method: AdapterMethod = "tsvm",
    weights: Sequence[float] | float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: DTypeName = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Merge adapters of one base into one adapter, without ever forming a dense update.

    A module that an adapter lacks counts as an update of zero.

    Args:
        adapters: folders or Hugging Face ids.
        out: a folder that does not exist yet or is empty.
        method: ``tsvm`` (TSV-Merge of the updates), ``linear`` (weighted average: the weights are divided by their
            sum) or ``task_arithmetic`` (weighted sum).
        weights: one per adapter, or one for all; None means 1.
        rank: largest rank of the merged updates; None keeps them exactly, at most at the sum of the ranks.
        energy: per module the smallest rank that holds this share of the merged update's squared Frobenius norm.
        dtype: of the factors.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each module.

    Raises:
        ConfigError, DeviceError, OutputExistsError, OutputBusyError, OutputUnfinishedError: the request cannot be
            carried out.
        AdapterRefusedError, PickleRefusedError, CheckpointError: an adapter is damaged or of a kind that is not
            supported.
        ShapeError: the adapters do not belong to one base.
        NonFiniteError, ConvergenceError: the values cannot be merged.
        DiskFullError: there is no room for the output.
    """
    start, target = time.perf_counter(), choose_device(device)
    factors = numbers_of(1.0 if weights is None else weights, len(adapters), "merge_lora: weights")
    if method not in get_args(AdapterMethod):
        raise ConfigError(f"method must be one of {', '.join(get_args(AdapterMethod))}, got {method!r}")
    if not adapters:
        raise ConfigError("no adapters; give at least one")
    rank_of((1, 1), rank, energy)
    if method == "linear":
        factors = normalized(factors)
    sources = [Adapter(adapter) for adapter in adapters]
    names = common_modules(sources)
    with _output(out, dtype, _sizes(sources), progress) as output:
        for name in names:
            own = [(source, weight) for source, weight in zip(sources, factors, strict=True) if name in source.modules]
            matrices, shares = [source.load(name, target) for source, _ in own], [weight for _, weight in own]
            if method == "tsvm":
                limit = fixed_rank(matrices[0].shape, len(matrices))
                merged = merge_factored(matrices, [limit] * len(matrices), shares)
                facts = {"certificate": merged.certificate, "ranks": merged.ranks, "energies": merged.captured_energy}
                update, report = _cut(merged.update, rank, energy, **facts)
            else:
                update, report = _cut(weighted_sum(matrices, shares), rank, energy)
            output.writer.add(name, update, embedding=own[0][0].modules[name].embedding)
            output.modules[name] = report
            output.done(name)
        _finish_like(output, sources)
        request = {"adapters": list(adapters), "method": method, "weights": factors, "rank": rank, "energy": energy,
                   "dtype": dtype}  # fmt: skip
        return _finish(output, Path(out), "merge-lora", request, start)


@contextmanager
def _output(
    out: str | Path, dtype: DTypeName, sizes: dict[str, int], progress: Callable[[Progress], None] | None
) -> Iterator[_Output]:
    """Yield an adapter that grows beside `out`, and move it there at the end; nothing stays if it fails."""
    out = Path(out)
    if is_single_file(out):
        raise ConfigError(f"{out}: an adapter is a folder; choose a name that does not end in .safetensors")
    with locked_stage(out) as stage:
        if stage.journal.exists():
            raise OutputUnfinishedError(f"{out}: a merge into it was stopped; finish it, or choose another output")
        stage.refuse_foreign((WEIGHTS_FILE, CONFIG_FILE, REPORT))
        stage.remove()
        try:
            with writing(out):
                stage.folder.mkdir()
                with AdapterWriter(stage.folder, getattr(torch, dtype)) as writer:
                    yield _Output(writer, sizes, progress)
                stage.publish()
        finally:
            stage.remove()


def _finish_like(output: _Output, sources: Sequence[Adapter]) -> None:
    """Write the adapter with the settings of the first source, after a last look at all of them.

    Raises:
        CheckpointError: the sources hold different weights of the base, so they do not belong to one.
    """
    for name, weight in common_base_layers(sources):
        output.writer.add_base_layer(name, weight)
    for source in sources:
        source.check_unchanged()
    config = sources[0].config
    output.writer.finish(
        base=config.base_model_name_or_path, task_type=config.task_type, fan_in_fan_out=config.fan_in_fan_out
    )


def _finish(output: _Output, out: Path, command: str, request: dict[str, Any], start: float) -> AdapterResult:
    """Write the report and return the result."""
    seconds = time.perf_counter() - start
    report = {
        "command": command,
        **request,
        "versions": {
            "r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "seconds": seconds,
        "captured_energy": _captured(output.modules, output.left_out),
        "modules": {name: asdict(module) for name, module in output.modules.items()},
        "left_out": {name: asdict(tensor) for name, tensor in output.left_out.items()},
    }  # fmt: skip
    write_json(output.writer.folder / REPORT, report)
    return AdapterResult(out, out / REPORT, output.modules, output.left_out, seconds)


def _captured(modules: dict[str, ModuleReport], left_out: dict[str, LeftOut]) -> float:
    whole = sum(m.norm**2 for m in modules.values()) + sum(tensor.norm**2 for tensor in left_out.values())
    kept = sum(module.captured_energy * module.norm**2 for module in modules.values())
    return kept / whole if whole else 1.0


def _cut(matrix: Factored, rank: int | None, energy: float | None, **facts: Any) -> tuple[Factored, ModuleReport]:
    """Cut an update to its rank, and report on it; `facts` are further fields of the report."""
    update, captured = truncated(matrix, rank_of(matrix.shape, rank, energy))
    singular_values = update.left.square().sum(0)  # each factor has their roots
    norm = float(torch.linalg.vector_norm(singular_values)) / math.sqrt(captured) if captured else 0.0
    return update, ModuleReport(matrix.shape, update.left.shape[1], norm, captured, **facts)


def _sizes(sources: Sequence[Adapter]) -> dict[str, int]:
    """Return the bytes to read per module."""
    sizes: dict[str, int] = {}
    for source in sources:
        for name, module in source.modules.items():
            sizes[name] = sizes.get(name, 0) + module.nbytes
    return sizes


def _not_expressible(tensor: TensorPlan, embed_lora: bool, tied: bool) -> str:
    """Return why a tensor is not adapted, or an empty string."""
    name, module = tensor.name, _last_part(tensor.name)
    if tensor.treatment.kind == "base":
        return tensor.treatment.reason
    if len(tensor.spec.shape) != 2:
        return f"{len(tensor.spec.shape)}-D: LoRA adapts matrices"
    if not name.endswith(".weight"):
        return "not the weight of a module"
    if not embed_lora and (module in _EMBEDDINGS or is_head(module)):
        return "embedding or output head; embed_lora adapts them"
    if tied and module in _TOKEN_EMBEDDINGS:
        return "embedding tied to the output head: PEFT would adapt one of the two"
    return ""


def _last_part(name: str) -> str:
    """Return the name that a module has in the one around it."""
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
    # Where the cut falls among nearly equal singular values, which of their vectors are kept is ill-determined; any
    # choice holds the same energy, and the exact mode would compute a full SVD to settle it.
    found = truncated_svd([delta], [rank], "fast")
    update = from_triplets(found.U[0], found.S[0], found.Vh[0])
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    energy = min(1.0, float(found.S[0].square().sum()) / norm**2) if norm else 1.0
    return update, ModuleReport((m, n), found.ranks[0], norm, energy, found.certificates[0])


def _not_finite(name: str) -> NonFiniteError:
    return NonFiniteError(
        f"{name}: a model holds NaN or infinity there, or the two differ by more than their dtype holds; "
        "repair the checkpoint or exclude the tensor"
    )


def _task_vector(plan: MergePlan, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield what the fine-tune changed, in pieces of whole rows, each with the index of its first row."""
    shape = plan.tensors[name].spec.shape
    rows = shape[0] if shape else 1
    step = max(1, _PIECE_BYTES * max(rows, 1) // max(1, dtype.itemsize * math.prod(shape)))
    for first in range(0, rows, step):
        part = (first, min(first + step, rows)) if shape else None
        before, after = (
            model.load(name, rows=part).to(dtype) for model in plan.inputs if isinstance(model, Checkpoint)
        )
        yield first, after - before
