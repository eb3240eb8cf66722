"""The merges of the study, and the measurements of one family of models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.quality.training import Batch, Scores, StateDict, Suite, score, train_family
from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.methods.rtsvm import PRESETS

# Defaults are chosen on the choice seeds of the choice suites, and judged on the held-out seeds of all suites. To save
# time, readings of the paper are compared on some suites only.
READING_SUITES = ("digits", "language", "tables")
CHOICE_SUITES = (*READING_SUITES, "light", "lora", "dpo")
SUITES = (*CHOICE_SUITES, "vision", "sequences")
CHOICE_SEEDS = (0, 1, 2)
HELD_OUT_SEEDS = (10, 11, 12, 13, 14)

ALPHAS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
DENSITIES = (0.2, 0.5, 0.8)

Options = dict[str, Any]

# Method, its options by default, and the parameter that is tuned beside alpha. The package's default keeps everything
# (density 1), which would switch these methods off; the defaults here are TIES's own density, and 0.5.
TABLE: list[tuple[str, Options, tuple[str, Sequence[float]]]] = [
    ("linear", {}, ("", ())),
    ("task_arithmetic", {}, ("", ())),
    ("model_stock", {}, ("", ())),
    ("ties", {"density": 0.2}, ("density", DENSITIES)),
    ("dare_linear", {"density": 0.5}, ("density", DENSITIES)),
    ("dare_ties", {"density": 0.5}, ("density", DENSITIES)),
    ("della_linear", {"density": 0.5}, ("density", DENSITIES)),
    ("della", {"density": 0.5}, ("density", DENSITIES)),
    ("breadcrumbs", {"density": 0.5}, ("density", DENSITIES)),
    ("breadcrumbs_ties", {"density": 0.5}, ("density", DENSITIES)),
    ("sce", {"select_topk": 0.5}, ("select_topk", (0.2, 0.5, 1.0))),
    ("iso_c", {}, ("", ())),
    ("iso_cts", {}, ("", ())),
    ("tsvm", {}, ("", ())),
]

# Where readings and candidates start. Options are spelled out, so that results keep their meaning when defaults change.
START: Options = {
    "outlier_weighting": "clip", "outlier_sigma": 3.0, "outlier_statistic": "magnitude", "outlier_measure": "share",
    "outlier_exponent": 1.0, "weight_normalization": "mean", "density": 1.0, "pruning": "count", "prune_first": False,
    "sparsity_eps": 0.1, "sparsity_relative": "mean", "sparsity_scope": "task",
    "rank": "auto", "rank_rho": 1.0, "rank_energy": 0.95,
    "orthogonalization_power": 0.0, "damping": 0.0, "retention": 0.0,
}  # fmt: skip


def readings() -> list[Options]:
    """Options of `rtsvm` for what the paper may mean: one ingredient at a time, then some together.

    Tasks with many outliers are damped and boosted with the same strength.
    """
    one_at_a_time: dict[str, Sequence[Any]] = {
        "outlier_weighting": ("none", "remove", "complement"),
        "outlier_sigma": (1.5, 2.0),
        "outlier_statistic": ("signed",),
        "density": (0.8, 0.5, 0.2),
        "pruning": ("threshold",),
        "sparsity_eps": (0.3, 1.0),
        "sparsity_scope": ("consensus",),
        "rank_rho": (0.0, 2.0, 4.0),
        "rank": ("noise", "shared", "sparsity_power"),
    }
    chosen = [START] + [START | {name: value} for name, values in one_at_a_time.items() for value in values]
    chosen += [START | {"rank": "energy", "rank_energy": energy} for energy in (0.5, 0.8)]
    chosen.append(START | {"prune_first": True, "density": 0.8})
    chosen.append(START | {"sparsity_relative": "max", "sparsity_eps": 0.01})
    for measure, exponent, weighting in product(("share", "mass"), (0.25, 0.5, 1.0), ("damp", "boost")):
        weights = {"outlier_measure": measure, "outlier_exponent": exponent}
        chosen.append(START | {"outlier_weighting": weighting} | weights)
    for weighting, density, rho in product(("none", "complement"), (1.0, 0.8, 0.5), (0.0, 2.0)):
        chosen.append(START | {"outlier_weighting": weighting, "density": density, "rank_rho": rho})
    return chosen


def candidates() -> list[Options]:
    """Options of `rtsvm` among which the rule of README.md chooses the defaults."""
    return [
        START
        | {"outlier_weighting": "none", "orthogonalization_power": power, "damping": damping, "retention": retention}
        for power, damping, retention in product((0.0, 0.5, 0.75, 1.0), (0.0, 2.0), (0.0, 0.5, "auto"))
    ]


def preset() -> Options:
    """Return what `preset: weighted` of `rtsvm` sets, in the form of `variants`."""
    return START | {name: value for name, value in PRESETS["weighted"].items() if name != "rank"}


def variants(suite: str, quick: bool = False) -> list[Options]:
    """Options of `rtsvm` that are compared on the choice seeds of a suite."""
    chosen = [*readings(), *candidates()] if suite in READING_SUITES else candidates()
    return distinct(chosen)[:3] if quick else distinct(chosen)


def distinct(chosen: Sequence[Options]) -> list[Options]:
    return [options for index, options in enumerate(chosen) if options not in chosen[:index]]


def rtsvm_defaults() -> Options:
    """Return today's defaults of `rtsvm`, in the form of `variants`."""
    values = METHODS["rtsvm"].parameters().model_dump()
    return {name: values[name][0] if isinstance(values[name], tuple) else values[name] for name in START}


def label(options: Options) -> str:
    """Name a variant by what differs from `START`."""
    changes = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
               for name, value in options.items() if value != START[name]]  # fmt: skip
    return ", ".join(changes) or "start"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Judge:
    """Scores state dicts of one suite."""

    def __init__(self, suite: Suite, model: nn.Module) -> None:
        self.suite, self.model = suite, model

    def validation(self, weights: StateDict) -> list[float]:
        return [round(value, 3) for value in self._score(weights, self.suite.validation).accuracy]

    def test(self, weights: StateDict) -> dict[str, list[float]]:
        scores = asdict(self._score(weights, self.suite.test))
        return {name: [round(value, 4) for value in values] for name, values in scores.items()}

    def _score(self, weights: StateDict, data: Mapping[str, Batch]) -> Scores:
        self.model.load_state_dict(weights)
        return score(self.suite, self.model, data)


def at_alpha(base: StateDict, merged: StateDict, alpha: float) -> StateDict:
    """Scale the update of a merge that was made at alpha 1, in which every method is linear."""
    if alpha == 1:
        return merged
    return {name: weight + alpha * (merged[name] - weight) for name, weight in base.items()}


def tune(
    judge: Judge,
    base: StateDict,
    merge: Callable[[Options], StateDict],
    settings: Sequence[Options],
    *,
    scalable: bool,
    test: bool,
) -> dict[str, Any]:
    """Merge with the options of each setting, the default first; choose options and alpha.

    Choose those with the best mean accuracy on validation data; among equals, those nearest to the default. If `test`,
    the choice and the default are scored on test data.
    """
    trials, merges = [], []
    for options in settings:
        merges.append(merge(options))
        for alpha in sorted(ALPHAS, key=lambda alpha: abs(math.log(alpha))) if scalable else (1.0,):
            validation = judge.validation(at_alpha(base, merges[-1], alpha))
            trials.append({"options": options, "alpha": alpha, "validation": validation})
    best = max(trials, key=lambda trial: mean(trial["validation"]))
    results = {}
    for name, trial in (("default", trials[0]), ("tuned", best)):
        results[name] = dict(trial)
        if test:
            weights = at_alpha(base, merges[settings.index(trial["options"])], trial["alpha"])
            results[name] |= judge.test(weights)
    return results


def run_seed(
    build: Callable[[int, bool], Suite],
    seed: int,
    tried: Sequence[Options],
    choosing: bool,
    quick: bool,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one family of models, merge it, and return all that is measured.

    Args:
        build: makes the suite.
        seed: of the data, the first weights, the batches and the random masks.
        tried: options of `rtsvm`.
        choosing: compare those with `tsvm` on validation data, and test nothing; otherwise test every method at its
            defaults, and tuned.
        quick: train a few steps.
        known: an earlier result, to which options that it lacks are added.
    """
    start = time.process_time()
    torch.manual_seed(seed)
    suite = build(seed, quick)
    base, experts = train_family(suite)
    judge = Judge(suite, suite.model())
    record: dict[str, Any] = {
        "notes": dict(suite.notes),
        "train_seconds": round(time.process_time() - start, 1),
        "methods": {},
        "rtsvm": {},
    } | dict(known or {})
    if not choosing and not known:
        record |= {"base": judge.test(base), "experts": [judge.test(expert) for expert in experts]}

    def merger(method: str) -> Callable[[Options], StateDict]:
        seeded = {"seed": seed} if "seed" in METHODS[method].parameters.model_fields else {}
        return lambda options: merge_state_dicts(base, experts, MergeConfig(method, **options, **seeded)).state_dict

    for method, options, (name, values) in TABLE:
        if known or (choosing and method != "tsvm"):
            continue
        tuned = [options] + [options | {name: value} for value in values if options[name] != value]
        scalable = "alpha" in METHODS[method].parameters.model_fields
        record["methods"][method] = tune(judge, base, merger(method), tuned, scalable=scalable, test=not choosing)
    for options in tried:
        if label(options) not in record["rtsvm"]:
            record["rtsvm"][label(options)] = tune(
                judge, base, merger("rtsvm"), [options], scalable=True, test=not choosing
            )
    record["seconds"] = round(record.get("seconds", 0.0) + time.process_time() - start, 1)
    return record
