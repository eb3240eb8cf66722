"""Print the README's table of CPU speed from the committed results; a test compares the two.

python benchmarks/readme_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"


def rows() -> list[str]:
    """The lines of the table, header included."""
    lines = ["| on two cores | against | ratio |", "|---|---|---|"]

    def add(what: str, against: str, ratio: dict[str, float] | float, digits: int = 1) -> None:
        if isinstance(ratio, float):
            lines.append(f"| {what} | {against} | {ratio:.0f} x faster |")
        else:
            spread = f"{ratio['q1']:.{digits}f} - {ratio['q3']:.{digits}f}"
            lines.append(f"| {what} | {against} | {ratio['median']:.{digits}f} x faster ({spread}) |")

    for row in read("elementwise.json")["rows"]:
        shape, ratios = "x".join(map(str, row["shape"])), row["ratios"]
        stage = f"statistics, clip, select, prune: {shape} bf16, T=3"
        add(stage, "eager torch, exact", ratios["eager / ours"])
        add(stage, "eager torch by `kthvalue`", ratios["kthvalue / ours"])
        floor = ratios["ours / floor, fresh"]
        spread = f"{floor['q1']:.2f} - {floor['q3']:.2f}"
        lines.append(f"| {stage} | copying as many bytes to fresh memory | {floor['median']:.2f} x slower ({spread}) |")
    for name, method in read("ties_vs_mergekit.json")["methods"].items():
        add(f"`{name}`, 4096x4096 bf16, T=3", "mergekit's functions", method["ratio"])
    engine = read("engine_vs_mergekit.json")
    size = f"{engine['checkpoint_bytes'] / 1e9:.1f} GB"
    for name, method in engine["methods"].items():
        add(f"`rtsvm merge`, `{name}`, 3 checkpoints of {size}, cached", "mergekit's command", method["ratio"])
        less = method["peak_bytes"]["peer"] / method["peak_bytes"]["ours"]
        lines.append(f"| the same: peak memory | mergekit's command | {less:.1f} x less |")
    for speed in (read("engine_speed.json"), read("engine_speed_1gb.json")):
        size = f"{speed['checkpoint_bytes'] / 1e9:.1f} GB"
        for state, told in (("cold", "from disk"), ("warm", "cached")):
            for part in ("task_arithmetic", "task_arithmetic, in the merge"):
                share = speed["results"][state]["speed_by_cp"][part]["cp and fsync"]
                what = f"`rtsvm merge`, `task_arithmetic`, 3 checkpoints of {size}, {told}"
                what += ", without starting Python" if "in the" in part else ""
                found = f"{share['median']:.2f} of its speed ({share['q1']:.2f} - {share['q3']:.2f})"
                lines.append(f"| {what} | `cp` and fsync of as many bytes | {found} |")
    spectral = read("spectral.json")
    for row in spectral["rows"]:
        if row["spectrum"] == "flat":
            add(
                f"TSV-Merge {row['n']}x{row['n']}, T=3, {row['ranks']}", "FusionBench's function", row["peer / ours"], 2
            )
    lora = spectral["lora"]
    size = f"{lora['n']}x{lora['n']}"
    add(f"TSV-Merge of three rank-{lora['rank']} LoRAs, {size}", "FusionBench's function", lora["peer / ours"])
    return lines


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


if __name__ == "__main__":
    print("\n".join(rows()))
