"""What the study keeps of a seed, as rows of results and back."""

from __future__ import annotations

from typing import Any

from r_tsvm_kernels.bench import Row, row

PROVIDER = "r_tsvm_kernels"
UNITS = {"validation": "%", "accuracy": "%", "bits": "bit"}
SETTINGS = ("default", "tuned")

Record = dict[str, Any]  # what `study.run_seed` returns


def settings_row(settings: dict[str, Any]) -> Row:
    """Return the row that keeps the settings of a study; its value is the number of seeds."""
    seeds = len(settings["choice_seeds"]) + len(settings["held_out_seeds"])
    return row("settings", PROVIDER, "seeds", seeds, unit="seeds", notes=settings)


def rows_of(seed: int, record: Record) -> list[Row]:
    """Return the rows of one seed: one per model, setting, metric and task; `notes` have the options of a merge."""

    def scores(name: str, kind: str, found: dict[str, Any], setting: str | None = None) -> list[Row]:
        notes = {key: found[key] for key in ("options", "alpha") if key in found}
        return [
            row(name, PROVIDER, metric, value, unit=unit, dtype="float32",
                options={"seed": seed, "kind": kind, "setting": setting, "task": task}, notes={} if task else notes)
            for metric, unit in UNITS.items() if metric in found for task, value in enumerate(found[metric])
        ]  # fmt: skip

    times = {"train": record["train_seconds"], "whole": record["seconds"]}
    rows = [row(name, PROVIDER, "processor time", value, unit="s", options={"seed": seed, "kind": "time"},
                notes=record["notes"]) for name, value in times.items()]  # fmt: skip
    if "base" in record:
        rows += scores("base", "base", record["base"])
        rows += [r for index, expert in enumerate(record["experts"]) for r in scores(str(index), "expert", expert)]
    for kind in ("methods", "rtsvm"):
        for name, found in record[kind].items():
            rows += [r for setting in SETTINGS for r in scores(name, kind, found[setting], setting)]
    return rows


def records_of(rows: list[Row]) -> dict[str, Record]:
    """Return the records by seed that `rows_of` was given."""
    found: dict[str, Record] = {}
    for r in rows:
        if "seed" not in r["options"]:
            continue
        record = found.setdefault(str(r["options"]["seed"]), {"methods": {}, "rtsvm": {}})
        kind, name = r["options"]["kind"], r["name"]
        if kind == "time":
            record |= {"notes": r["notes"], "seconds" if name == "whole" else "train_seconds": r["median"]}
            continue
        if kind == "base":
            scores = record.setdefault("base", {})
        elif kind == "expert":
            experts = record.setdefault("experts", [])
            if int(name) == len(experts):
                experts.append({})
            scores = experts[int(name)]
        else:
            scores = record[kind].setdefault(name, {}).setdefault(r["options"]["setting"], {})
            scores |= r["notes"]
        scores.setdefault(r["metric"], []).append(r["median"])
    return found
