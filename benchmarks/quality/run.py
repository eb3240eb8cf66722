"""Train small models, merge them in every way the package knows, and write down how good the merges are.

    python -m benchmarks.quality.run                       # everything that is missing; then the table in README.md
    python -m benchmarks.quality.run --suites digits --seeds 0 10
    python -m benchmarks.quality.run --restart             # throw earlier results away
    python -m benchmarks.quality.run --quick --out DIR     # a few steps of training, for tests

One process per worker (`--workers`, 2), each with one thread. A suite's results are one JSON file, which is replaced
whenever a seed is done; existing results are not computed again. Choice seeds come first: the candidate that they
choose is then tested with the other methods. README.md has the protocol. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import table
from benchmarks.quality.analysis import RESULTS, chosen
from benchmarks.quality.records import Record, records_of, rows_of, settings_row
from benchmarks.quality.study import (
    ALPHAS,
    CHOICE_SEEDS,
    CHOICE_SUITES,
    HELD_OUT_SEEDS,
    START,
    SUITES,
    TABLE,
    Options,
    distinct,
    label,
    preset,
    rtsvm_defaults,
    run_seed,
    variants,
)
from r_tsvm_kernels.bench import Results, read_rows


def settings(suite: str, quick: bool) -> dict[str, Any]:
    """Everything that results of one file have to have in common."""
    as_json: dict[str, Any] = json.loads(json.dumps({
        "quick": quick, "alphas": ALPHAS, "table": TABLE, "variants": variants(suite, quick), "start": START,
        "choice_seeds": CHOICE_SEEDS, "held_out_seeds": HELD_OUT_SEEDS,
    }))  # fmt: skip
    return as_json


def run(suite: str, seed: int, tried: Sequence[Options], quick: bool, known: Record | None) -> tuple[str, int, Record]:
    torch.set_num_threads(1)
    build = import_module(f"benchmarks.quality.suite_{suite}").build
    return suite, seed, run_seed(build, seed, tried, seed in CHOICE_SEEDS, quick, known)


def load(path: Path, suite: str, quick: bool) -> dict[str, Record] | None:
    """Return earlier records by seed, or None if they are of a study with other settings."""
    rows = read_rows(path) if path.exists() else []
    return None if rows and rows[0]["notes"] != settings(suite, quick) else records_of(rows)


def save(path: Path, suite: str, records: dict[str, Record], quick: bool) -> None:
    """Write all records; the circumstances are those of the last run."""
    rows = [settings_row(settings(suite, quick))]
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
    files = {suite: options.out / f"{suite}.json" for suite in SUITES}
    results = {}
    for suite, path in files.items():  # the choice needs all suites, those that are not run now included
        found = load(path, suite, options.quick)
        if found is None and suite in options.suites and not options.restart:
            raise SystemExit(f"{path} is of a study with other settings: use --restart, or another folder with --out")
        results[suite] = {} if found is None or (options.restart and suite in options.suites) else found

    def compute(pool: ProcessPoolExecutor, jobs: Sequence[tuple[str, int, list[Options]]]) -> None:
        missing = [
            (suite, seed, tried) for suite, seed, tried in jobs
            if not {label(each) for each in tried} <= results[suite].get(str(seed), {}).get("rtsvm", {}).keys()
        ]  # fmt: skip
        submitted = [pool.submit(run, *job, options.quick, results[job[0]].get(str(job[1]))) for job in missing]
        for job in as_completed(submitted):
            suite, seed, record = job.result()
            results[suite][str(seed)] = record
            save(files[suite], suite, results[suite], options.quick)
            print(f"{suite}, seed {seed}: {record['seconds']:.0f} s of processor time", flush=True)

    # A worker imports torch afresh: threads of a forked one may hang.
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [(suite, seed) for seed in options.seeds for suite in options.suites]
        compute(pool, [(suite, seed, variants(suite, options.quick)) for suite, seed in jobs
                       if seed in CHOICE_SEEDS and suite in CHOICE_SUITES])  # fmt: skip
        judged = distinct([START, rtsvm_defaults(), chosen(results) or START, preset()])
        compute(pool, [(suite, seed, judged) for suite, seed in jobs if seed not in CHOICE_SEEDS])
    if options.out == RESULTS:
        table.write()


if __name__ == "__main__":
    main()
