"""A report as `rtsvm merge` writes it, of a model that was never merged."""

import math
from dataclasses import asdict

from r_tsvm_kernels.linalg import Certificate
from r_tsvm_kernels.methods import TensorReport
from r_tsvm_kernels.report import plain, summary, time_per_stage

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.{}.up_proj")


def entry(index, shape=(64, 96), models=2, **fields):
    share = (1 + index % 17) / 20
    certificate = Certificate(
        error=1e-7 * (1 + index % 50), orthogonality=1e-15, subspace_error=1e-9, tolerance=1e-4, route="gram-float64",
        basis_rank=(20, 20), basis_condition=(float("nan"), 2.0),
        gap=0.0 if index % 10 == 7 else 0.25, arbitrary=index % 10 == 7,
        escalations=("gram-float32: too close",) if index % 10 == 3 else (),
    )  # fmt: skip
    report = TensorReport(
        "rtsvm", "merge", "", shape, [10 + index % 7] * models, [12 + index % 7] * models, [share] * models,
        [share / 2] * models, [1.0] * models, [1 - share / 2] * models, certificate, [share, share / 2],
        [0.5] * models, 0.25, 0.01,
        {"read": [0.1, 0.05], "merge": [0.01, 0.01], "spectral": [0.008, 0.008], "write": [0.002, 0.001]},
        [1 - share / 4] * models, [1 - share / 3] * models, 1 + share / 5,
    )  # fmt: skip
    rest = {
        "parameters": {"alpha": 0.5 + index / 100}, "dtype": "bfloat16", "bytes": 2 * math.prod(shape),
        "file": "model.safetensors",
    }  # fmt: skip
    return plain(asdict(report)) | rest | fields


def names(layers, experts=1):
    """Names of the matrices of a model with experts."""
    yield "lm_head.weight"
    for layer in range(layers):
        for kind in KINDS:
            for expert in range(experts if "{}" in kind else 1):
                yield f"model.layers.{layer}.{kind.format(expert)}.weight"


def report(tensors, models=("org/math", "org/code"), **fields):
    """Return the report of these entries, by name."""
    return {
        "name": "R-TSVM of math, code", "summary": summary(tensors),
        "method": {"name": "rtsvm", "pretty_name": "R-TSVM", "paper_url": "https://example.org"},
        "base": "org/base", "models": list(models), "recipe": {}, "recipe_yaml": "merge_method: rtsvm\n",
        "parameters": {
            "weight": 1.0, "alpha": [0.5, 1.0], "density": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
        },
        "model_parameters": [{"weight": 0.5}, *[{}] * (len(models) - 1)],
        "kernels": {"task_gram": "cpu", "gemm3": "torch"}, "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2"}, "device": "cpu", "engine": "local", "threads": 1,
        "seconds": 12.0, "resumed_tensors": 0, "bytes_read": 1000, "bytes_written": 500,
        "stages": time_per_stage(tensors), "tensors": tensors, **fields,
    }  # fmt: skip


def of_model(layers, experts=1):
    """Return the report of a model of that size."""
    entries = [entry(index) for index in range(50)]
    return report({name: entries[index % 50] for index, name in enumerate(names(layers, experts))})
