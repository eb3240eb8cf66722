"""Train small models, merge them in every way the package knows, and write down how good the merges are.

    python -m benchmarks.quality.run                       # everything that is missing; then the table in README.md
    python -m benchmarks.quality.run --suites digits --seeds 0 10
    python -m benchmarks.quality.run --restart             # throw earlier results away
    python -m benchmarks.quality.run --quick --out DIR     # a few steps of training, for tests

One process per worker (`--workers`, 2), each with one thread. A suite's results are one JSON file, which is replaced
whenever a seed is done; existing results are not computed again. README.md has the protocol. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.quality import table
from benchmarks.quality.records import Record, records_of, rows_of, settings_row
from benchmarks.quality.study import ALPHAS, START, TABLE, label, rtsvm_defaults, run_seed, variants
from r_tsvm_kernels.bench import Results, read_rows

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


def run(suite: str, seed: int, quick: bool) -> tuple[str, int, Record]:
    torch.set_num_threads(1)
    return (
        suite,
        seed,
        run_seed(import_module(f"benchmarks.quality.suite_{suite}").build, seed, seed in CHOICE_SEEDS, quick),
    )


def load(path: Path, quick: bool, restart: bool) -> dict[str, Record]:
    """Return earlier records by seed, to be continued, or none."""
    if restart or not path.exists():
        return {}
    rows = read_rows(path)
    if rows[0]["notes"] != settings(quick):
        raise SystemExit(f"{path} is of a study with other settings: use --restart, or another folder with --out")
    return records_of(rows)


def save(path: Path, records: dict[str, Record], quick: bool) -> None:
    """Write all records; the circumstances are those of the last run."""
    rows = [settings_row(settings(quick))]
    for seed, record in sorted(records.items(), key=lambda item: int(item[0])):
        rows += rows_of(int(seed), record)
    Results(path, ("scikit-learn",), replace=True).add(rows)


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
            if label(rtsvm_defaults()) not in results[suite].get(str(seed), {}).get("rtsvm", {})]  # fmt: skip
    # A worker imports torch afresh: threads of a forked one may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        for job in as_completed([pool.submit(run, suite, seed, options.quick) for suite, seed in jobs]):
            suite, seed, record = job.result()
            results[suite][str(seed)] = record
            save(files[suite], results[suite], options.quick)
            print(f"{suite}, seed {seed}: {record['seconds']:.0f} s of processor time", flush=True)
    if options.out == RESULTS:
        table.write()


if __name__ == "__main__":
    main()
