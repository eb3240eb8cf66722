"""Every row of every result file as tables: the pages docs/speed.md and docs/accuracy.md, by `tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cells import Report, error, factor, gigabytes, provenance, read, seconds, shape, share, size, table
from rich.text import Text

from r_tsvm_kernels.bench.table import LEGEND, result_table


def elementwise(report: Report) -> list[str]:
    rows = report["rows"]
    sizes = [shape(row["shape"]) for row in rows]
    times = [[name, *(seconds(row["seconds"][name]) for row in rows)] for name in rows[0]["seconds"]]
    memory = [[f"{name}: peak memory beside inputs", *(size(row["peak_extra_bytes"][name]) for row in rows)]
              for name in rows[0]["peak_extra_bytes"]]  # fmt: skip
    ratios = [[f"`{name}`", *(share(row["ratios"][name]) for row in rows)] for name in rows[0]["ratios"]]
    return [*table(["what", *sizes], times + memory), "", *table(["ratio of times", *sizes], ratios)]


def ties(report: Report) -> list[str]:
    def line(name: str, method: dict[str, Any]) -> list[str]:
        times = [seconds(method["seconds"][side]) for side in ("ours", "peer")]
        peaks = [size(method["peak_bytes"][side]) for side in ("ours", "peer")]
        errors = [error(method[kind][side]) for kind in ("errors", "errors_bfloat16") for side in ("ours", "peer")]
        return [f"`{name}`", *times, factor(method["ratio"]), *peaks, *errors, verdict(method["right"])]

    columns = ["method", "ours", "mergekit", "ours is", "peak memory", "theirs", "error, float32", "theirs",
               "error, bfloat16", "theirs", "verdict"]  # fmt: skip
    return table(columns, [line(name, method) for name, method in report["methods"].items()])


def engine_vs_mergekit(report: Report) -> list[str]:
    def line(name: str, method: dict[str, Any]) -> list[str]:
        times = [seconds(method["seconds"][side]) for side in ("ours", "peer")]
        peaks = [size(method["peak_bytes"][side]) for side in ("ours", "peer")]
        errors = [f"{method['errors'][side]['element']:.3g}" for side in ("ours", "peer")]
        return [f"`{name}`, {gigabytes(report['checkpoint_bytes'])}", *times, factor(method["ratio"]), *peaks, *errors,
                verdict(method["right"])]  # fmt: skip

    columns = ["method, checkpoints", "ours", "mergekit", "ours is", "peak memory", "theirs", "largest error", "theirs",
               "verdict"]  # fmt: skip
    return table(columns, [line(name, method) for name, method in report["methods"].items()])


def engine_speed(report: Report) -> list[str]:
    lines = []
    for state, told in (("cold", "from disk"), ("warm", "cached")):
        result = report["results"][state]
        for what, time in result["seconds"].items():
            speed = result["speed_by_cp"].get(what)
            shares = [share(speed[copy]) if speed else "" for copy in ("cp", "cp and fsync")]
            lines.append([f"`{what}`", gigabytes(report["checkpoint_bytes"]), told, seconds(time), *shares])
    return table(["what", "checkpoints", "inputs", "time", "speed by that of `cp`", "of `cp` and fsync"], lines)


def engine_memory(report: Report) -> list[str]:
    rows = [
        [f"`{row['method']}`", gigabytes(row["checkpoint_bytes"]), f"{row['peak_bytes'] / 1e6:.0f} MB",
         f"{row['seconds']:.1f} s"]
        for row in report["rows"]
    ]  # fmt: skip
    return table(["method", "checkpoints", "peak memory", "time"], rows)


def spectral(report: Report) -> list[str]:
    rows = [
        [row["spectrum"], shape([row["n"], row["n"]]), row["ranks"], seconds(row["seconds"]),
         f"{row['sgemm']['median']:.0f}", seconds(row["peer_seconds"]), factor(row["peer / ours"]), error(row["error"]),
         error(row.get("peer_error")), row["route"]]
        for row in report["rows"]
    ]  # fmt: skip
    columns = ["spectrum", "shape", "ranks", "ours", "in float32 products", "FusionBench", "ours is", "error", "theirs",
               "route"]  # fmt: skip
    growth = [
        [str(row["n"]), str(row["T"]), seconds(row["ours"]), seconds(row["peer"]),
         factor(row["peer"]["median"] / row["ours"]["median"])]
        for axis in ("n", "T") for row in report["growth"][axis]["rows"]
    ]  # fmt: skip
    exponents = "; ".join(
        f"with {axis} as {axis}^{found['exponent']['ours']:.2f} (ours) and {axis}^{found['exponent']['peer']:.2f}"
        for axis, found in report["growth"].items()
    )
    lora = report["lora"]
    adapters = [["rank-16 factors, ours", seconds(lora["seconds"])],
                ["their product, ours", seconds(lora["ours_dense_seconds"])],
                ["their product, FusionBench", seconds(lora["peer_seconds"])]]  # fmt: skip
    return [
        *table(columns, rows), "",
        f"Growth at k = n // T, one matrix after the other: {exponents}.", "",
        *table(["n", "T", "ours", "FusionBench", "ours is"], growth), "",
        f"Three LoRA adapters of rank {lora['rank']}, {shape([lora['n']] * 2)}; error {error(lora['error'])}:", "",
        *table(["input", "time"], adapters),
    ]  # fmt: skip


def bench(report: Report) -> list[str]:
    """The table that `rtsvm bench` prints, one line per benchmark and input."""
    return [*above_bench(report), *table(*printed(report))]


def bench_full(report: Report) -> list[str]:
    """The same in a table for each input, the kinds of benchmark after one another."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault(f"{row['matrix']}, {shape(row['shape'])}, {row['dtype']}", []).append(row)
    lines = above_bench(report)
    for label, rows in groups.items():
        columns, cells = printed(report | {"rows": rows})
        place = columns.index("matrix")
        without = [[*line[:place], *line[place + 1 :]] for line in (columns, *cells)]
        lines += [f"### {label}", "", *table(without[0], without[1:]), ""]
    return lines[:-1]


def above_bench(report: Report) -> list[str]:
    legend = [f"- **{name.strip()}**: {text.strip()}" for name, text in legend_entries()]
    return [f"{result_table(report).title}. Suite `{report['suite']}`.", "", *legend, ""]


def printed(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of what `rtsvm bench` prints."""
    columns = result_table(report).columns
    cells = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in columns]
    return [str(column.header) for column in columns], list(map(list, zip(*cells, strict=True)))


def legend_entries() -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for line in LEGEND.splitlines():
        if line.startswith(" "):
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        else:
            name, _, text = line.partition("  ")
            entries.append((name, text.strip()))
    return entries


def mergekit_cli(report: Report) -> list[str]:
    sizes = report["checkpoint_bytes"]

    def line(name: str, case: dict[str, Any]) -> list[str]:
        used = sizes["extracted" if name == "extract-lora" else "merged"]
        times = [seconds(case["seconds"][side]) for side in ("with", "without")]
        peaks = [size(case["peak_bytes"][side]) for side in ("with", "without")]
        checked = [f"{case['checked'][side]:.3g}" for side in ("with", "without")]
        return [f"`{name}`", gigabytes(used), *times, factor(case["ratio"]), *peaks, *checked, verdict(case["right"]),
                f"`{case.get('commit', report['commit'])[:7]}`"]  # fmt: skip

    columns = ["case", "checkpoints", "with ours", "without", "with ours it is", "peak memory", "without", "checked",
               "without", "verdict", "commit"]  # fmt: skip
    return table(columns, [line(name, case) for name, case in report["cases"].items()])


def peft(report: Report) -> list[str]:
    rows = [
        [row["case"], row["shape"], side, seconds(row["seconds"][side]), seconds(row["seconds"]["peft"]), factor(ratio),
         size(row["peak_bytes"][side]), size(row["peak_bytes"]["peft"]), f"{row['distance'][side]:.6f}",
         f"{row['distance']['peft']:.6f}", verdict(row["right"])]
        for row in report["cases"] for side, ratio in row["ratio"].items()
    ]  # fmt: skip
    columns = ["case", "shape", "side", "time", "PEFT", "it is", "peak memory", "PEFT", "distance to the uncut update",
               "PEFT", "verdict"]  # fmt: skip
    return table(columns, rows)


def fusion_bench(report: Report) -> list[str]:
    rows = [
        [side, seconds(report["seconds"][side]), factor(report["ratio"][side]) if side in report["ratio"] else "",
         size(report["peak_bytes"][side]), error(report["error_against_float64"][side], 1),
         error(report["distance_to_theirs"].get(side), 1)]
        for side in report["seconds"]
    ]  # fmt: skip
    what = f"{report['tasks']} models of {gigabytes(report['checkpoint_bytes'])}, verdict: {verdict(report['right'])}."
    columns = ["side", "time", "it is", "growth of memory", "error against float64", "distance to theirs"]
    return [what, "", *table(columns, rows)]


def spectral_accuracy(report: Report) -> list[str]:
    routes = list(dict.fromkeys(name for row in report["rows"] for name in row["routes"]))
    rows = [
        [row["case"], row["ranks"], "" if row["basis_condition"] is None else f"{row['basis_condition']:.0f}",
         row["routes"]["eigen exact"]["route"],
         *(error(row["routes"].get(name, {}).get("error")) for name in routes)]
        for row in report["rows"]
    ]  # fmt: skip
    return table(["case", "ranks", "condition", "route of `eigen exact`", *routes], rows)


def tsvm_vs_fusion_bench(report: Report) -> list[str]:
    def energy(row: dict[str, Any], side: str) -> str:
        return f"{100 * row[f'untouched_energy_{side}']:.1f} %" if row["untouched_rows"] else ""

    rows = [
        [row["case"], shape(row["shape"]), str(row["rank"]), "" if not row["condition"] else f"{row['condition']:.0f}",
         error(row["error_ours"]), error(row["error_peer"]), error(row["distance"]), str(row["untouched_rows"] or ""),
         energy(row, "ours"), energy(row, "peer"), "not judged" if row["right"] is None else verdict(row["right"])]
        for row in report["rows"]
    ]  # fmt: skip
    columns = ["case", "shape", "rank", "condition", "error of ours", "of theirs", "distance", "untouched rows",
               "energy there, ours", "theirs", "verdict"]  # fmt: skip
    return table(columns, rows)


def shortcuts(report: Report) -> list[str]:
    kinds = dict.fromkeys((row["spectrum"], row["ranks"]) for row in report["rows"])
    errors = {(row["shortcut"], row["spectrum"], row["ranks"]): row["error"] for row in report["rows"]}
    names = dict.fromkeys(row["shortcut"] for row in report["rows"])
    rows = [[name, *(error(errors[name, kind, ranks]) for kind, ranks in kinds)] for name in names]
    return table(["shortcut", *(f"{kind}, {ranks}" for kind, ranks in kinds)], rows)


def honesty(report: Report) -> list[str]:
    counts = ("calls", "judged", "arbitrary", "needless", "refused", "dishonest")
    rows = [[f"`{row['function']}`", *(str(row[count]) for count in counts), f"{row['worst_ratio']:.2f}"]
            for row in report["rows"]]  # fmt: skip
    return table(["function", *counts, "largest true over stated error"], rows)


def verdict(right: bool) -> str:
    return "right" if right else "**WRONG**"


class Section(NamedTuple):
    """One result file on a page."""

    file: str
    heading: str
    program: str
    words: str  # what was measured; what a reader must know to read the table
    lines: Callable[[Report], list[str]]


SPEED = (
    Section("bench.json", "Every op and every method", "rtsvm bench --json", "", bench),
    Section("elementwise.json", "Stage one of R-TSVM", "benchmarks/elementwise.py",
            "Statistics, clipping, exact selection and pruning of bfloat16 matrices, T = 3, density 0.3. `floor` is a "
            "threaded copy of as many bytes as must move, into memory in use (warm) or fresh memory, as our outputs "
            "are; `eager` is our reference in torch, `kthvalue` the shortest eager version one would write.",
            elementwise),
    Section("ties_vs_mergekit.json", "Merge functions against mergekit's", "benchmarks/peers/compare_ties.py",
            "4096x4096, T = 3, density 0.3, checked against float64 first. Errors are relative to the update; DARE's "
            "masks are other draws on the two sides, so theirs has no error here.", ties),
    Section("engine_vs_mergekit.json", "Merges of checkpoints against mergekit's", "benchmarks/peers/compare_engine.py",
            "Whole commands with the inputs in the page cache, a base and two fine-tunes. The largest error of an "
            "element is a multiple of what rounding to bfloat16 and float32 sums allow; mergekit's `task_arithmetic` "
            "sums in bfloat16.", engine_vs_mergekit),
    Section("engine_speed.json", "Merges of checkpoints against cp, large", "benchmarks/engine_speed.py",
            "A base and two fine-tunes are read, one model is written; `cp` copies as many bytes. All ratios below "
            "one are losses. `in the merge` leaves out the start of Python and the import of torch.", engine_speed),
    Section("engine_speed_1gb.json", "Merges of checkpoints against cp, small", "benchmarks/engine_speed.py --size 1",
            "", engine_speed),
    Section("engine_memory.json", "Peak memory", "benchmarks/engine_memory.py",
            "Of all processes of a merge together, for growing checkpoints, a base and two fine-tunes; one run each.",
            engine_memory),
    Section("spectral.json", "TSV-Merge against FusionBench's function", "benchmarks/spectral.py",
            "Float32 matrices, T = 3. FusionBench's function has one rank, r // T; our smaller ranks are held against "
            "it, too, because that is what adaptive ranks save. Errors are against float64 SVDs.", spectral),
    Section("mergekit_cli.json", "mergekit's commands with our backend", "benchmarks/peers/compare_mergekit_cli.py",
            "`rtsvm mergekit-yaml` against `mergekit-yaml`, whole commands. `checked` is the largest error of an "
            "element as a multiple of what is allowed; for random masks the norm of the update; for `extract-lora` "
            "the error as a multiple of the best of that rank. Two rounds; in the first half of the run, up to the "
            "first round of `della`, compilations ran beside it at low priority.",
            mergekit_cli),
    Section("fusion_bench.json", "FusionBench's TSVM with our solver", "benchmarks/peers/compare_fusion_bench.py",
            "CLIP vision models, loading included, without the start of Python. `accelerated` is FusionBench's "
            "algorithm on our solver, `ours` our `tsvm` as its algorithm.", fusion_bench),
    Section("peft.json", "PEFT's add_weighted_adapter with our backend", "benchmarks/peers/compare_peft.py",
            "Three rank-16 adapters combined to rank 16. `ours` is PEFT's call on our kernels, `state dicts` our "
            "function without a model, `extract` PEFT's conversion to LoRA against `rtsvm extract-lora`'s function.",
            peft),
)  # fmt: skip

SHAPES = (
    Section("bench_full.json", "By matrix and dtype", "rtsvm bench --full --json",
            "Without torch.compile, which has a table of its own below.", bench_full),
    Section("bench_compiled.json", "With torch.compile", "rtsvm bench --full --only NAME --json",
            "The ops for which torch.compile makes something of the best version in torch; `best torch` is the faster "
            "of the two. Compiling is not counted.", bench),
)  # fmt: skip

ACCURACY = (
    Section("spectral_accuracy.json", "Solvers and shortcuts, small and trained", "benchmarks/spectral_accuracy.py",
            "Relative error of the merged update (Frobenius norm). `whitening` is the published eigenvalue variant. "
            "The solver `products` is simulated by rounding; its last columns are formats without fallback. "
            "FusionBench has one rank, r // T. Task matrices of `low rank` have a smaller one: there it merges "
            "arbitrary null vectors, too, which is not rounding.", spectral_accuracy),
    Section("spectral_accuracy_1024.json", "Solvers and shortcuts, 1024 columns", "benchmarks/spectral_accuracy.py",
            "", spectral_accuracy),
    Section("tsvm_vs_fusion_bench.json", "tsvm against FusionBench's function", "benchmarks/peers/compare_tsvm.py",
            "Distance is that between the two results. Not judged: where the bases have no full rank, the two differ "
            "by intention.", tsvm_vs_fusion_bench),
    Section("honesty.json", "Certificates against numpy", "make fuzz",
            "Random calls, judged by float64 SVDs of numpy; `?` are calls that ended with an exception of ours. A call "
            "is dishonest if its true error is above twice the stated one, or above a tolerance that is said to be "
            "met. `arbitrary`: the certificate admits to a choice among equal singular values. The choice was checked, "
            "and the result judged for it, but not in `iso_cts`, `star` and `core_space`, whose choices cannot be "
            "seen from outside. `needless`: those where a change of the last bits makes no difference.", honesty),
)  # fmt: skip

# Those that stand in prose elsewhere.
ELSEWHERE = (Section("shortcuts.json", "", "benchmarks/shortcuts.py", "", shortcuts),)


def page(sections: Sequence[Section], results: Path, pictures: dict[str, str]) -> list[str]:
    """The sections whose results are there, each with a picture if `pictures` names one for its file."""
    lines: list[str] = []
    for section in sections:
        path = results / section.file
        if not path.exists():
            continue
        report = read(path)
        lines += [f"## {section.heading}", "", provenance(path, report, section.program)]
        lines += ["", section.words] if section.words else []
        lines += ["", f"![{section.heading}]({pictures[section.file]})"] if section.file in pictures else []
        lines += ["", *section.lines(report), ""]
    return lines[:-1]
