"""Judge methods that came after the study on its held-out seeds, beside three of its methods.

    python -m benchmarks.quality.further                          # compute what is missing, then renew the table
    python -m benchmarks.quality.further --suites digits --seeds 10
    python -m benchmarks.quality.further --quick --out FILE       # a few steps of training, for tests

Protocol, suites and seeds are those of README.md; methods are at alpha 1, and with alpha tuned on validation data. Two
published methods are defined here alone, to find out whether the package should have them: see `ace` and `wudi`. A seed
takes about ten minutes of processor time. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.analysis import RESULTS, standard_error
from benchmarks.quality.study import ALPHAS, HELD_OUT_SEEDS, SUITES, Judge, Options, mean, tune
from benchmarks.quality.training import StateDict, train_family
from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.bench import Results, Row, read_rows, row
from r_tsvm_kernels.methods import METHODS

FILE = RESULTS / "further.json"
README = Path(__file__).resolve().parent / "README.md"
PART = re.compile(r"(<!-- further -->\n).*(\n<!-- end of further -->)", re.DOTALL)
# Beside the method itself, "+ svc" calibrates the singular values of its update.
REFERENCES = ("task_arithmetic", "tsvm", "rtsvm, weighted")
NEW = (
    "consensus_ta", "pcb", "subspace_boosting", "ram", "ramplus_tl", "star", "knots",
    "task_arithmetic + svc", "ties + svc", "tsvm + svc", "ace", "wudi",
)  # fmt: skip
OPTIONS: dict[str, Options] = {"rtsvm": {"preset": "weighted"}, "ties": {"density": 0.2}}

Tasks = Sequence[Tensor]  # D_t, (m, n)


def wudi(tasks: Tasks) -> Tensor:
    """Return the minimum of WUDI's objective, ``sum_t |(M - D_t) D_t^T|^2 / |D_t|^2``: a linear system in M.

    Source: Cheng et al., arXiv 2503.08099, who take steps of Adam towards it.
    """
    grams = [task.mT @ task / task.square().sum().clamp(min=1e-300) for task in tasks]
    right = torch.stack([task @ gram for task, gram in zip(tasks, grams, strict=True)]).sum(0)
    return right @ torch.linalg.pinv(torch.stack(grams).sum(0), rtol=1e-9, hermitian=True)


def ace(tasks: Tasks, ridge: float = 1e-2, share: float = 0.3, uneven: float = 0.3) -> Tensor:
    """Return the merged task vector of ACE-Merging, as its authors' program computes it.

    Covariances ``S_t = C_t^T C_t`` of the centred task matrices C_t take the place of those of the inputs. If the tasks
    differ much in size, the S_t are normalised, and the leading singular directions are added with equal values.

    Source: Xu et al., "ACE-Merging", CVPR 2026, arXiv 2603.02945.
    """
    squares = torch.stack([task.square().sum() for task in tasks])
    logs = (squares + 1e-12).log()
    differ = bool(logs.var() > uneven * logs.mean() ** 2)
    centred = [task - task.mean(0, keepdim=True) for task in tasks]
    grams = [matrix.mT @ matrix for matrix in centred]
    traces = [gram.trace() + 1e-12 if differ else torch.ones(()) for gram in grams]
    grams = [gram / trace for gram, trace in zip(grams, traces, strict=True)]
    one = torch.eye(len(grams[0]), dtype=torch.float64)
    loaded = [gram + ridge / trace * one for gram, trace in zip(grams, traces, strict=True)]
    total = torch.stack(loaded).sum(0)
    prior = torch.stack(grams).sum(0).mean(0, keepdim=True) / (squares.mean() if differ else 1)
    merged = torch.stack([c @ s for c, s in zip(centred, loaded, strict=True)]).sum(0) @ torch.linalg.pinv(
        total + prior
    )
    if differ:
        mean_gram = total / len(tasks)
        rest = torch.stack([c @ (g - mean_gram) for c, g in zip(centred, grams, strict=True)]).sum(0)
        U, S, Vh = torch.linalg.svd(rest + merged, full_matrices=False)
        count = int(share * len(S))
        merged = merged + S[:count].mean() * (U[:, :count] @ Vh[:count]) if count else merged
    return merged


def merged_by(formula: Callable[[Tasks], Tensor], base: StateDict, experts: Sequence[StateDict]) -> StateDict:
    """Merge matrices by a formula, and all else by the mean, as the package does."""
    found = {}
    for name, weight in base.items():
        if not weight.is_floating_point():
            found[name] = weight
            continue
        tasks = [expert[name].double() - weight.double() for expert in experts]
        update = formula(tasks) if weight.ndim == 2 else torch.stack(tasks).mean(0)
        found[name] = (weight.double() + update).to(weight.dtype)
    return found


def run(suite_name: str, seed: int, quick: bool) -> list[Row]:
    """Train one family, merge it by every method, and return mean accuracies."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    suite = import_module(f"benchmarks.quality.suite_{suite_name}").build(seed, quick)
    base, experts = train_family(suite)
    judge, rows = Judge(suite, suite.model()), list[Row]()
    for name in (*REFERENCES, *NEW):
        method, _, calibration = name.partition(" + ")
        method = method.partition(",")[0]
        formula, own = {"ace": ace, "wudi": wudi}.get(method), dict(OPTIONS.get(method, {}))
        settings, scalable = [own], formula is not None or "alpha" in METHODS[method].parameters.model_fields
        if calibration:  # of the update that alpha has scaled
            settings, scalable = [own | {"calibrate": calibration, "alpha": alpha} for alpha in (1.0, *ALPHAS)], False

        def merge(options: Options, method: str = method, formula: Any = formula) -> StateDict:
            if formula is not None:
                return merged_by(formula, base, experts)
            return merge_state_dicts(base, experts, MergeConfig(method, **options)).state_dict

        found = tune(judge, base, merge, settings, scalable=scalable, test=True)
        for setting, entry in found.items():
            options = {"suite": suite_name, "seed": seed, "setting": setting}
            accuracy = mean(entry["accuracy"])
            rows.append(row(name, "r_tsvm_kernels", "accuracy", accuracy, unit="%", dtype="float32", options=options,
                            notes={"alpha": entry["options"].get("alpha", entry["alpha"])}))  # fmt: skip
    return rows


def scores(rows: Sequence[Row], name: str, setting: str) -> dict[str, dict[int, float]]:
    """Return the accuracies of a method by suite and seed."""
    found: dict[str, dict[int, float]] = {}
    for own in rows:
        if own["name"] == name and own["options"]["setting"] == setting:
            found.setdefault(own["options"]["suite"], {})[own["options"]["seed"]] = own["median"]
    return found


def text(rows: Sequence[Row]) -> str:
    """Return the table: the mean of the suites, and the difference from `tsvm` at alpha 1 with its standard error."""
    seeds = {suite: sorted(by_seed) for suite, by_seed in scores(rows, "tsvm", "default").items()}
    shared = sorted(set.intersection(*map(set, seeds.values())))

    def means(name: str, setting: str) -> list[float]:
        found = scores(rows, name, setting)
        return [mean([found[suite][seed] for suite in seeds]) for seed in shared]

    lines = [
        f"Means of {len(seeds)} suites, in %, and differences in points, with standard errors over several seeds. "
        f"Held-out seeds: {', '.join(map(str, shared))}.",
        "",
        "| method | alpha 1 | above `tsvm` at alpha 1 | alpha tuned | above `tsvm` tuned | worst suite, tuned |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*REFERENCES, *NEW):
        cells, worst = [], ""
        for setting in ("default", "tuned"):
            own, other = means(name, setting), means("tsvm", setting)
            apart = [a - b for a, b in zip(own, other, strict=True)]
            error = f" ± {standard_error(apart):.2f}" if len(apart) > 1 else ""
            cells += [f"{mean(own):.1f}", "" if name == "tsvm" else f"{mean(apart):+.2f}{error}"]
        own_tuned, other_tuned = scores(rows, name, "tuned"), scores(rows, "tsvm", "tuned")
        by_suite = {
            suite: mean([own_tuned[suite][seed] - other_tuned[suite][seed] for seed in shared]) for suite in seeds
        }
        if name != "tsvm":
            worst = min(by_suite, key=by_suite.__getitem__)
            worst = f"{worst} {by_suite[worst]:+.1f}"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {worst} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--seeds", nargs="+", type=int, default=HELD_OUT_SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, help="file for the results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="train a few steps only, for tests")
    options = parser.parse_args()
    if options.quick and options.out == FILE:
        parser.error("--quick needs --out: its results would replace the study's")
    rows = read_rows(options.out) if options.out.exists() else []
    known = {(own["options"]["suite"], own["options"]["seed"]) for own in rows}
    jobs = [(suite, seed) for seed in options.seeds for suite in options.suites if (suite, seed) not in known]
    # A worker imports torch afresh: threads of a forked one may hang.
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in as_completed([pool.submit(run, *job, options.quick) for job in jobs]):
            rows += job.result()
            Results(options.out, ("scikit-learn",), replace=True).add(rows)
            print(f"{rows[-1]['options']['suite']}, seed {rows[-1]['options']['seed']}: done", flush=True)
    if options.out == FILE:
        README.write_text(PART.sub(lambda match: match[1] + text(rows) + match[2], README.read_text()))
    else:
        print(text(rows))


if __name__ == "__main__":
    main()
