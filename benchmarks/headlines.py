"""The figures that README.md and the pages quote, each from the result file that it names; for `tables.py`."""

from __future__ import annotations

import textwrap
from pathlib import Path

from cells import Report, Spread, error, factor, gigabytes, read, shape, table
from result_tables import shortcuts

CPU = "benchmarks/results/cpu"


# What the README shows of the table, by how a row begins.
SHORT = ("statistics", "`ties`", "`rtsvm merge`", "the same, 3 checkpoints of 4", "TSV-Merge 2048", "`iso_cts`")


def short(results: Path) -> list[str]:
    """The README's part of the table: gains, and the losses beside them."""
    head, rule, *lines = speed(results)
    return [head, rule, *(line for line in lines if line.removeprefix("| ").startswith(SHORT))]


def speed(results: Path) -> list[str]:
    """Gains, and the losses beside them. Rows of results that are not there are left out."""
    cpu = results / "cpu"
    rows: list[list[str]] = []

    def add(what: str, against: str, found: str, file: str) -> None:
        rows.append([what, against, found, f"`{file}`"])

    stage = read(cpu / "elementwise.json")["rows"][0]
    name = f"statistics, clip, select, prune: {shape(stage['shape'])} bf16, T=3"
    add(name, "eager torch, exact", factor(stage["ratios"]["eager / ours"]), "elementwise.json")
    add(name, "copying as many bytes", factor(inverse(stage["ratios"]["ours / floor, fresh"])), "elementwise.json")
    ties = read(cpu / "ties_vs_mergekit.json")
    gain = ties["methods"]["ties"]["ratio"]
    add(f"`ties`, {shape(ties['shape'])} bf16, T=3", "mergekit's function", factor(gain), "ties_vs_mergekit.json")
    engine = read(cpu / "engine_vs_mergekit.json")
    size, method = gigabytes(engine["checkpoint_bytes"]), engine["methods"]["task_arithmetic"]
    less = method["peak_bytes"]["peer"] / method["peak_bytes"]["ours"]
    add(f"`rtsvm merge`, `task_arithmetic`, 3 checkpoints of {size}, cached", "mergekit's command",
        f"{factor(method['ratio'])}, in {less:.0f} x less memory", "engine_vs_mergekit.json")  # fmt: skip
    for file, state, told in (("engine_speed.json", "cold", "from disk"), ("engine_speed_1gb.json", "warm", "cached")):
        report = read(cpu / file)
        ratio = report["results"][state]["speed_by_cp"]["task_arithmetic"]["cp and fsync"]
        size = gigabytes(report["checkpoint_bytes"])
        add(f"the same, 3 checkpoints of {size}, {told}", "`cp` and fsync of as many bytes", factor(ratio), file)
    spectral = read(cpu / "spectral.json")
    largest = max((row for row in spectral["rows"] if "peer_error" in row), key=lambda row: row["n"])
    add(f"TSV-Merge {shape([largest['n']] * 2)}, T=3, k = r // T", "FusionBench's function",
        factor(largest["peer / ours"]), "spectral.json")  # fmt: skip
    ratios = {(row["n"], row["T"]): row["peer"]["median"] / row["ours"]["median"]
              for found in spectral["growth"].values() for row in found["rows"]}  # fmt: skip
    (n, tasks), worst = min(ratios.items(), key=lambda item: item[1])
    add(f"TSV-Merge {n}x{n}, T={tasks}, k = r // T: the worst of {len(ratios)} sizes and T", "FusionBench's function",
        factor(worst), "spectral.json")  # fmt: skip
    lora = spectral["lora"]
    add(f"TSV-Merge of three rank-{lora['rank']} LoRAs, {shape([lora['n']] * 2)}, from their factors",
        "FusionBench's function, dense", factor(lora["peer / ours"]), "spectral.json")  # fmt: skip
    for file, lines in (("bench.json", of_bench), ("mergekit_cli.json", of_mergekit_cli),
                        ("fusion_bench.json", of_fusion_bench), ("peft.json", of_peft)):  # fmt: skip
        if (cpu / file).exists():
            for what, against, ratio in lines(read(cpu / file)):
                add(what, against, factor(ratio), file)
    sentences = [memory(results), startup(results)]
    if (cpu / "bench.json").exists():
        sentences.append(losses(read(cpu / "bench.json")))
    if (cpu / "bench_full.json").exists():
        sentences.append(over_shapes(read(cpu / "bench_full.json")))
    if (cpu / "bench_compiled.json").exists():
        sentences.append(compiled(read(cpu / "bench_compiled.json")))
    return [*table(["on two cores", "against", "ours is", "file"], rows), "", *wrapped(" ".join(sentences))]


def timed(report: Report, role: str) -> list[Report]:
    """Rows of `rtsvm bench` that have a time beside eager torch's."""
    return [row for row in report["rows"] if row["role"] == role and row["status"] == "timed" and "speedup" in row]


def losses(report: Report) -> str:
    """How many ops and methods of `rtsvm bench` torch wins."""
    count, eager, known, best = won_by_torch(report)
    return (
        f"Of {count} ops and methods of `rtsvm bench`, {are(eager)} slower than eager torch; of {known} for which "
        f"there is a version in torch by somebody who took pains, {are(best)} slower than that (`bench.json`)."
    )


def over_shapes(report: Report) -> str:
    """The same of `rtsvm bench --full`, and the worst."""
    count, eager, known, best = won_by_torch(report)
    matrices = len({row["matrix"] for row in report["rows"]})
    worst = min(timed(report, "ours"), key=lambda row: row["speedup"]["median"])
    return (
        f"Over {matrices} matrices of public models, some in three dtypes, {eager} of {count} times are longer than "
        f"eager torch's and {best} of {known} than the best of torch; against eager torch the worst is "
        f"`{worst['name']}` at {shape(worst['shape'])}, {factor(worst['speedup'])} ([all](shapes.md), "
        "`bench_full.json`)."
    )


def compiled(report: Report) -> str:
    """How often torch.compile wins, and by how much at most."""
    ours, theirs = (
        {(row["name"], row["matrix"], row["dtype"]): row["seconds"]["median"] for row in timed(report, role)
         if role == "ours" or row["provider"] == "torch.compile"}
        for role in ("ours", "torch")
    )  # fmt: skip
    ratios = {key: theirs[key] / ours[key] for key in ours.keys() & theirs.keys()}
    worst = min(ratios, key=lambda key: ratios[key])
    return (
        f"torch.compile, compiling not counted, makes code for `add_update`, for which we have no kernel on a CPU, and "
        f"beats ours in {sum(ratio < 1 for ratio in ratios.values())} of {len(ratios)} others: `{worst[0]}` is "
        f"{factor(ratios[worst])} at worst (`bench_compiled.json`)."
    )


def won_by_torch(report: Report) -> tuple[int, int, int, int]:
    """Count our times, how many eager torch beats, those beside a best version in torch, how many that beats."""
    ours, best = (
        {(row["name"], row["matrix"], row["dtype"]): row["speedup"]["median"] for row in timed(report, role)}
        for role in ("ours", "torch")
    )
    both = ours.keys() & best.keys()
    eager = sum(speedup < 1 for speedup in ours.values())
    return len(ours), eager, len(both), sum(best[key] > ours[key] for key in both)


def are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"


def of_bench(report: Report) -> list[tuple[str, str, Spread]]:
    gains = timed(report, "ours")
    worst = min(gains, key=lambda row: row["speedup"]["median"])
    what = f"`{worst['name']}`, {shape(worst['shape'])}: the worst of {len(gains)} ops and methods of `rtsvm bench`"
    return [(what, "eager torch", worst["speedup"])]


def of_mergekit_cli(report: Report) -> list[tuple[str, str, Spread]]:
    cases = sorted(report["cases"].items(), key=lambda item: item[1]["ratio"]["median"])
    told = {"best": cases[-1], "worst": cases[0]}
    return [
        (f"mergekit's command with our backend, `{name}`: the {which} of {len(cases)}", "without", case["ratio"])
        for which, (name, case) in told.items()
    ]


def of_fusion_bench(report: Report) -> list[tuple[str, str, Spread]]:
    return [("FusionBench's TSVM with our solver, whole models", "without", report["ratio"]["accelerated"])]


def of_peft(report: Report) -> list[tuple[str, str, Spread]]:
    row = max(
        (row for row in report["cases"] if row["case"] == "svd"), key=lambda row: row["seconds"]["peft"]["median"]
    )
    return [
        (f"PEFT's `add_weighted_adapter`, `svd`, {row['shape']}, with our kernels", "without", row["ratio"]["ours"])
    ]


def inverse(ratio: Spread) -> Spread:
    return {"median": 1 / ratio["median"], "q1": 1 / ratio["q3"], "q3": 1 / ratio["q1"]}


def memory(results: Path) -> str:
    rows = read(results / "cpu" / "engine_memory.json")["rows"]
    peaks, sizes = [row["peak_bytes"] for row in rows], [row["checkpoint_bytes"] for row in rows]
    methods = " and ".join(f"`{name}`" for name in dict.fromkeys(row["method"] for row in rows))
    return (
        f"The peak memory of {methods} does not grow with the model: {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} "
        f"MB for checkpoints of {gigabytes(min(sizes))} to {gigabytes(max(sizes))} (`engine_memory.json`)."
    )


def startup(results: Path) -> str:
    times = read(results / "cpu" / "engine_speed_1gb.json")["results"]["warm"]["seconds"]
    start = times["task_arithmetic"]["median"] - times["task_arithmetic, in the merge"]["median"]
    ratio = read(results / "cpu" / "engine_speed_1gb.json")["results"]["warm"]["speed_by_cp"]
    without = factor(ratio["task_arithmetic, in the merge"]["cp and fsync"])
    return (
        f"Starting Python and torch takes {start:.1f} s of a merge (`engine_speed_1gb.json`): without it, the merge of "
        f"small cached checkpoints above is {without} than `cp` and fsync."
    )


def error_of(row: Report, route: str = "eigen exact") -> float:
    value: float = row["routes"][route]["error"]
    return value


def conditions(results: Path) -> list[str]:
    """How ill-conditioned the bases are, for the page on numerics."""
    rows = [row for name in ("spectral_accuracy", "spectral_accuracy_1024")
            for row in read(results / "cpu" / f"{name}.json")["rows"] if row["basis_condition"]]  # fmt: skip
    found = {}
    for ranks in ("k = r // T", "k = r // 4T"):
        values = sorted(row["basis_condition"] for row in rows if row["ranks"] == ranks)
        found[ranks] = f"{values[len(values) // 2]:.3g} in the median and {values[-1]:.3g} at most"
    worst = max(error_of(row, "float32 SVD") for row in rows)
    return wrapped(
        f"Measured condition numbers of the bases (`{CPU}/spectral_accuracy.json` and `spectral_accuracy_1024.json`): "
        f"at k = r // T {found['k = r // T']}, at k = r // 4T {found['k = r // 4T']}. The largest error of float32 "
        f"SVDs throughout was {error(worst, 1)} there."
    )


def honesty(results: Path) -> list[str]:
    """How many certificates were judged, and how they did, for the page on numerics."""
    report = read(results / "cpu" / "honesty.json")
    choices = report["outcomes"].get("arbitrary", 0)
    unseen = sum(row["arbitrary"] for row in report["rows"] if row["function"] in ("iso_cts", "star", "core_space"))
    return wrapped(
        f"The last long run judged {report['calls']} calls (`{CPU}/honesty.json`, sources `{report['sources']}`): "
        f"{report['dishonest']} were dishonest, the largest true error was {report['worst_ratio']:.2f} times "
        f"the stated one, and {choices} admitted to an arbitrary choice ({report['needless']} of them needlessly). "
        f"In {unseen} of these, all of `iso_cts`, `star` and `core_space`, the choice could not be seen, and the "
        "result was not judged."
    )


def table_of_shortcuts(results: Path) -> list[str]:
    return shortcuts(read(results / "cpu" / "shortcuts.json"))


def demo_table(results: Path) -> list[str]:
    """What the demo ends with."""
    report = read(results / "quality" / "demo.json")
    rows = [[name, *(f"{value:.1f}" for value in (*values, sum(values) / len(values)))]
            for name, values in report["accuracy"].items()]  # fmt: skip
    return table(["model", *report["tasks"], "mean"], rows)


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
