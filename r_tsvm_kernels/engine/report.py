"""The report of a merge, as JSON and as a page, and the model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import Checkpoint, is_model_id
from ..config import MergeConfig
from ..errors import CheckpointError
from ..files import read_regular, write_json, write_text
from ..plan import MergePlan, common_parameters, model_parameters, varying_parameters
from ..report import inherited_terms, model_card, plain, report_page, short_name, summary, time_per_stage
from .fingerprint import kernels
from .job import MergeJob
from .journal import Finished, as_report
from .output import page_path, report_path, writing

CARD = "README.md"
# Largest report that is read; the report of a hundred thousand tensors is far smaller.
_MOST_BYTES = 1 << 30


def write_report(job: MergeJob, run: Mapping[str, Any]) -> None:
    """Write the report of a merge into its stage, as JSON and as a page.

    Args:
        job: the merge, with all tensors finished; reports of tensors merged before a resumption are in its journal.
        run: facts of this run: engine, threads, seconds, number of resumed tensors.
    """
    plan, stage = job.plan, job.stage
    config, tensors = plan.config, {name: _entry(plan, job.finished[name]) for name in plan.tensors}
    models = _models(config)
    recipe = config.model_dump(mode="json", exclude_defaults=True)
    method = config.method
    report = {
        "name": f"{method.pretty_name} of {', '.join(dict.fromkeys(short_name(model) for model in models))}",
        "summary": summary(tensors),
        "method": {"name": method.name, "pretty_name": method.pretty_name, "paper_url": method.paper_url},
        "base": config.base_model or models[0],
        "models": models,
        "recipe": {"merge_method": config.merge_method, **recipe},
        "recipe_yaml": config.to_yaml(),
        "parameters": common_parameters(config),
        "model_parameters": model_parameters(config),
        "versions": {
            "r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(job.device),
        "kernels": kernels(job.device, method),
        **run,
        "dropped": {str(path): list(names) for path, names in plan.beside.items()},
        "notes": list(plan.notes),
        "dequantised": plan.dequantised,
        "vocabulary": None if plan.vocabulary is None else plan.vocabulary.summary(),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "stages": time_per_stage(tensors),
        "tensors": tensors,
    }  # fmt: skip
    report = plain(report)
    write_json(stage.folder / report_path(stage.out).name, report)
    write_text(stage.folder / page_path(stage.out).name, report_page(report))


def write_page(out: str | Path) -> Path:
    """Write the page of a finished merge again, from its JSON report.

    Args:
        out: the output of the merge.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: the report is missing or invalid, or the page cannot be written.
    """
    out = Path(out)
    source, target = report_path(out), page_path(out)
    try:
        page = report_page(json.loads(read_regular(source, _MOST_BYTES)))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{source}: cannot be read ({reason}); was {out} written by `rtsvm merge`?") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: not the report of a merge by this version ({type(error).__name__}: {error}); merge again"
        ) from error
    with writing(target):
        write_text(target, page)
    return target


def write_card(plan: MergePlan, folder: Path) -> None:
    """Write the model card. It inherits the licence that the base's card names."""
    config = plan.config
    models = _models(config)
    everything = [*([config.base_model] if config.base_model else []), *models]
    base = plan.base.folder
    card = model_card(
        config.to_yaml(),
        config.method.pretty_name,
        config.method.paper_url,
        config.base_model if config.method.forms_vectors(True) else None,
        models,
        hub_ids=[model.partition("@")[0] for model in everything if is_model_id(model)],
        library=_library(plan.base),
        inherited={} if base is None else inherited_terms(base / CARD),
    )
    write_text(folder / CARD, card)


def _models(config: MergeConfig) -> list[str]:
    """Return the models by name; those of slices and modules each once."""
    return [str(entry.model) for entry in config.models] or config.model_names


def _library(base: Checkpoint) -> str | None:
    """Return the library that loads a model, judging by its files; None if unknown."""
    if base.folder and (base.folder / "modules.json").is_file():
        return "sentence-transformers"
    if "_diffusers_version" in base.config or (base.folder and (base.folder / "model_index.json").is_file()):
        return "diffusers"
    return "transformers" if base.config.keys() & {"model_type", "architectures"} else None


def _entry(plan: MergePlan, finished: Finished) -> dict[str, Any]:
    """Return the report's entry of a tensor."""
    tensor = plan.tensors[finished.name]
    merged = tensor.treatment.kind != "base"
    dtypes = [own.dtype for own in finished.stored]
    return asdict(as_report(finished.report)) | {
        "parameters": varying_parameters(plan.section(finished.name).config, tensor.options) if merged else {},
        "dtype": dtypes[0] if dtypes else "",
        "bytes": finished.nbytes,
        "file": ", ".join(dict.fromkeys(own.shard for own in finished.stored)),
    }
