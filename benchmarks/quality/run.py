"""Train small models, merge them in every way the package knows, and write down how good the merges are.

    python benchmarks/quality/run.py                       # everything that is missing; then the table in README.md
    python benchmarks/quality/run.py --suites digits --seeds 0 10
    python benchmarks/quality/run.py --restart             # throw earlier results away
    python benchmarks/quality/run.py --quick --out DIR     # a few steps of training, for tests

One process per worker (`--workers`, 2), each with one thread. A suite's results are one JSON file, which is replaced
whenever a seed is done; what is there already is not run again. README.md tells the protocol. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import table
from record import ROOT, provenance
from study import ALPHAS, START, TABLE, label, rtsvm_defaults, run_seed, variants

RESULTS = ROOT / "benchmarks" / "results" / "quality"
SUITES = ("digits", "language", "tables")
CHOICE_SEEDS = (0, 1, 2)  # defaults are chosen on these,
HELD_OUT_SEEDS = (10, 11, 12, 13, 14)  # and judged on these


def settings(quick: bool) -> dict[str, Any]:
    """Everything that results of one file have to have in common."""
    as_json: dict[str, Any] = json.loads(json.dumps({
        "quick": quick, "alphas": ALPHAS, "table": TABLE, "variants": variants(quick), "start": START,
        "choice_seeds": CHOICE_SEEDS, "held_out_seeds": HELD_OUT_SEEDS,
    }))  # fmt: skip
    return as_json


def run(suite: str, seed: int, quick: bool) -> tuple[str, int, dict[str, Any]]:
    torch.set_num_threads(1)
    return suite, seed, run_seed(import_module(f"suite_{suite}").build, seed, seed in CHOICE_SEEDS, quick)


def load(path: Path, quick: bool, restart: bool) -> dict[str, Any]:
    """Return earlier results, to be continued, or none."""
    if restart or not path.exists():
        return {"settings": settings(quick), "seeds": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if results["settings"] != settings(quick):
        raise SystemExit(f"{path} is of a study with other settings: use --restart, or another folder with --out")
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    results["seeds"] = dict(sorted(results["seeds"].items(), key=lambda item: int(item[0])))
    results["provenance"] = provenance("scikit-learn")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the quality of merges of models that are really trained.")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[*CHOICE_SEEDS, *HELD_OUT_SEEDS])
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="do not continue earlier results")
    parser.add_argument("--quick", action="store_true", help="train a few steps only, for tests")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out: its results would replace the study's")

    options.out.mkdir(parents=True, exist_ok=True)
    files = {suite: options.out / f"{suite}.json" for suite in options.suites}
    results = {suite: load(path, options.quick, options.restart) for suite, path in files.items()}
    jobs = [(suite, seed) for seed in options.seeds for suite in options.suites
            if label(rtsvm_defaults()) not in results[suite]["seeds"].get(str(seed), {}).get("rtsvm", {})]  # fmt: skip
    # A worker imports torch afresh: threads of a forked one may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for job in as_completed([pool.submit(run, suite, seed, options.quick) for suite, seed in jobs]):
            suite, seed, record = job.result()
            results[suite]["seeds"][str(seed)] = record
            save(files[suite], results[suite])
            print(f"{suite}, seed {seed}: {record['seconds']:.0f} s of processor time", flush=True)
    if options.out == RESULTS:
        table.write()


if __name__ == "__main__":
    main()
