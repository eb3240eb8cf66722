"""The pages docs/speed.md and docs/accuracy.md: every row of the committed results, by the one printer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks import ROOT
from r_tsvm_kernels.bench import Row, read_rows
from r_tsvm_kernels.bench.table import LEGEND, MARK, fitting, markdown, older, sheets, where


class Section(NamedTuple):
    """One file of results on a page."""

    file: str  # below benchmarks/results/cpu
    heading: str
    program: str
    words: str  # what was measured; what a reader must know to read the table
    by: Literal["role", "provider"] = "provider"
    split: tuple[str, ...] = ()
    picture: str | None = None


SPEED = (
    Section("bench.json", "Every op and every method", "rtsvm bench --json FILE", "",
            "role", ("matrix", "shape", "dtype"), "plots/bench.svg"),
    Section("bench_mergekit.json", "Merge methods against mergekit's functions",
            ".venv-mergekit/bin/python -m r_tsvm_kernels bench --only merges --json FILE",
            "The same in mergekit's environment. mergekit sums in the dtype of the weights, ours in float32.",
            "role", ("matrix", "shape", "dtype")),
    Section("engine.json", "Merges of checkpoints", "python -m benchmarks.engine --cold --mergekit",
            "Whole commands with a base and two fine-tunes; `cp` of two models reads and writes as many bytes. "
            "`started` leaves out starting Python and importing torch. `worst element` is the largest error as a "
            "multiple of what rounding to bfloat16 and float32 sums allow; mergekit's `task_arithmetic` sums in "
            "bfloat16.", split=("inputs",)),
    Section("spectral.json", "TSV-Merge against FusionBench's function", "python -m benchmarks.spectral",
            "FusionBench's function has one rank, r // T; our smaller ranks are compared with it too, because adaptive "
            "ranks replace that run. Errors are relative to float64 SVDs.",
            split=("series",), picture="plots/growth.svg"),
    Section("weighted.json", "Weighted orthogonalisation", "python -m benchmarks.weighted",
            "`rtsvm` by default and with its preset `weighted` (whole methods), and `weighted_merge` alone, against "
            "our TSV-Merge and FusionBench's function, in turns. Errors are relative to float64 SVDs; `condition` is "
            "that of each task matrix, `power` is q.", split=("spectrum",)),
    Section("trained_layer.json", "A Llama layer", "python -m benchmarks.trained_layer",
            "The seven matrices of a layer of width 2048 with 5632 hidden units, T = 3: whole methods with their "
            "defaults against FusionBench's function, in turns. `trained`: a language model of this one layer, "
            "fine-tuned on three kinds of text. `power 0.5`: singular values i^-0.5; one square stands for four, one "
            "rectangle for three. Errors are relative to float64 SVDs.", split=("deltas",)),
    Section("leading_share.json", "Weighted orthogonalisation of rectangles", "python -m benchmarks.leading_share",
            "`weighted_merge` orthogonalises the ceil(r / T) leading directions of each task on both sides of a "
            "rectangle. Here it is a share of that number. `gain` is the mean validation accuracy above `tsvm`, both "
            "at alpha 1, on the choice seeds of the quality study."),
    Section("parts.json", "Merges from parts", "python -m benchmarks.parts",
            "A base and three fine-tunes of the shapes of Mistral-7B, both sides divided by 2: embedding, head and "
            "three layers. `anew` decomposes for each merge; the others read the parts that one decomposition wrote. "
            "Errors are differences from the direct merge, relative to the update; both outputs are rounded to "
            "bfloat16. The machine did other work at low priority."),
    Section("packed_experts.json", "Packed experts", "python -m benchmarks.packed_experts",
            "Experts of gpt-oss (2880x2880) and Qwen3-MoE (768x2048), both sides divided by 12, merged by `tsvm` as "
            "one packed tensor and one by one. `eigen` solves each expert alone in both cases. `products` solves "
            "batches of experts; on a CPU it is simulated, so its times say nothing about a GPU."),
    Section("gpu_work.json", "Work of solver products, counted", "python -m benchmarks.gpu_work",
            "Counted on a CPU, for three tasks, on the path that a GPU takes: a prediction, no GPU ran it. `launches` "
            "counts all operations of PyTorch and all Triton kernels, `replayed` the same where loops are CUDA graphs: "
            "one launch, and a copy of each argument and result."),
    Section("second_solves.json", "Second solves of solver products", "python -m benchmarks.second_solves",
            "Task matrices, those with compressed spectra, those for which that was not foreseen, so that they were "
            "solved twice, and merges whose estimated error is above exact mode's tolerance, so that another solver "
            "follows. Trained ones are those of the quality study's suites, seed 0, and of the digits demo's model, "
            "four times as wide. Solver `products` is simulated; nothing is timed."),
    Section("roofline.json", "Floors on an H200, predicted", "python -m benchmarks.roofline",
            "Computed from counts; no GPU ran anything. `bytes` must move, `fp16` and `float64` are operations, "
            "`floor` is the time that they take at the rates of NVIDIA's data sheet (4.8 TB/s, 989 and 67 TFLOP/s). "
            "No kernel can be faster, and none reaches it. Inputs are bfloat16; a layer is that of Mistral-7B, from "
            "the counts of the previous section, without its launches."),
    Section("mergekit.json", "rtsvm merge beside mergekit",
            "python -m benchmarks.peers.compare_mergekit",
            "Whole commands, `rtsvm merge` against `mergekit-yaml`, on the same recipes: a base and two fine-tunes in "
            "Llama's shapes. `checked` is as in the next section; for methods of two models, the difference of the two "
            "outputs, relative to one of them. Left out where they differ by design, see "
            "[mergekit](mergekit.md#same-recipe-same-weights): `della*`, `model_stock`, `arcee_fusion`. Methods that "
            "take minutes have fewer rounds."),
    Section("mergekit_cli.json", "mergekit's commands on our kernels",
            "python -m benchmarks.peers.compare_mergekit_cli",
            "`rtsvm mergekit yaml` against `mergekit-yaml`, whole commands. `checked` is the largest error of an "
            "element as a multiple of what is allowed; for random masks the norm of the update; for `extract-lora` the "
            "error as a multiple of the best of that rank. Compilations at low priority disturbed the first half of "
            "the run."),
    Section("fusion_bench.json", "FusionBench's TSVM on our solver",
            "python -m benchmarks.peers.compare_fusion_bench",
            "CLIP vision models, with loading, without starting Python."),
    Section("peft.json", "PEFT's add_weighted_adapter on our kernels",
            ".venv-peft/bin/python -m benchmarks.peers.compare_peft",
            "Three rank-16 adapters combined to rank 16. `combine_adapters` is our function without a model; `extract` "
            "compares PEFT's conversion to LoRA with `rtsvm extract-lora`."),
)  # fmt: skip

ACCURACY = (
    Section("spectral_accuracy.json", "Solvers and shortcuts, small and trained",
            "python -m benchmarks.spectral_accuracy",
            "Relative error of the merged update (Frobenius norm). `whitening` is the published eigenvalue variant. "
            "The solver `products` is simulated by rounding; its last columns are formats without fallback. "
            "FusionBench has one rank, r // T. Task matrices of `low rank` have a smaller one: there it merges "
            "arbitrary null vectors, too, which is not rounding."),
    Section("spectral_accuracy_1024.json", "Solvers and shortcuts, 1024 columns",
            "python -m benchmarks.spectral_accuracy --sizes 1024 --solvers eigen", ""),
    Section("tsvm_vs_fusion_bench.json", "tsvm against FusionBench's function",
            "python -m benchmarks.peers.compare_tsvm",
            "`FusionBench, float64` confirms our float64 result. Where the bases do not have full rank, the two differ "
            "by design, and `energy in untouched rows` says how."),
    Section("honesty.json", "Certificates against numpy", "make fuzz",
            "Random calls, judged by float64 SVDs of numpy; `?` are calls that ended with an exception of ours. A call "
            "is dishonest if its true error exceeds twice the stated one, or a tolerance that it claims to meet. "
            "`arbitrary`: the certificate reports a choice among equal singular values. The choice was checked and the "
            "result judged for it, except in `iso_cts`, `star` and `core_space`, whose choices cannot be seen from "
            "outside. `needless`: changes of the last bits make no difference."),
)  # fmt: skip

# Files that other parts of the documentation show or link to.
ELSEWHERE = ("bench_full.json", "bench_compiled.json", "shortcuts.json")


def page(sections: Sequence[Section], results: Path, current: str | None) -> list[str]:
    """Return the sections whose results exist."""
    lines: list[str] = []
    for section in sections:
        if (results / section.file).exists():
            lines += [*section_lines(section, results / section.file, current), ""]
    return lines[:-1]


def section_lines(section: Section, path: Path, current: str | None) -> list[str]:
    """Return one file of results as a section."""
    rows = read_rows(path)
    lines = [f"## {section.heading}", "", f"`{relative(path)}`, written by `{section.program}`.", *runs(rows, current)]
    if any(row["role"] == "ceiling" for row in rows):
        lines.append(f"- {where(rows)}.")
    lines += ["", section.words] if section.words else []
    lines += ["", f"![{section.heading}]({section.picture})"] if section.picture else []
    if section.by == "role":
        roles = {row["role"] for row in rows}
        lines += ["", *(f"- **{name}**: {text}" for name, text in LEGEND.items()
                        if "peer" in roles or name not in ("peer", "over peer"))]  # fmt: skip
    for sheet in sheets(rows, section.by, split=section.split, current=current):
        lines += ["", f"### {sheet.title}"] if section.split else ["", f"{sheet.title}:"] if sheet.title else []
        lines += ["", *markdown(fitting(sheet))]
        if any(MARK in line[0] for line in sheet.lines):
            lines += ["", f"{MARK} measured on older code."]
    return lines


def runs(rows: Sequence[Row], current: str | None) -> list[str]:
    """Return one line per run: machine, date, sources, versions."""
    found: dict[str, None] = {}
    for row in rows:
        machine = row["machine"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if name != "r_tsvm_kernels")
        sources = f"sources `{row['sources']}`" if row["sources"] else "unknown sources"
        age = " (**older code**)" if current is not None and older([row], current) else ""
        found[f"- {machine['cpu']}, {threads}; {row['date'][:10]}; {sources}{age}; {versions}."] = None
    return ["", *found]


def relative(path: Path) -> str:
    """Return a path below the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
