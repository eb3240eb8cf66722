"""Models to sweep over, and evaluations of them, for the tests."""

import json
import sys
from pathlib import Path

from checkpoints import family
from safetensors.torch import load_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints

# Prints the distance of a model from another one. It starts quickly, because it imports no library.
DISTANCE = """
import array, json, struct, sys
def values(path):
    data = open(path + "/model.safetensors", "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header, found = json.loads(data[8:8 + size]), {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            start, end = entry["data_offsets"]
            found[name] = array.array("f", data[8 + size + start:8 + size + end])
    return found
one, other = map(values, sys.argv[1:3])
print(sum((a - b) ** 2 for name in other for a, b in zip(one[name], other[name])) ** 0.5)
"""


def models(folder: Path, method="task_arithmetic", **parameters) -> MergeConfig:
    """Write a base and two fine-tunes; return a recipe."""
    paths, _, _ = family(folder, shards=(1,))
    return MergeConfig(method, base_model=str(paths[0]), models=[str(path) for path in paths[1:]], **parameters)


def distance(model, target):
    """Return the distance of two models, in float64."""
    one, other = (load_file(path / "model.safetensors") for path in (model, target))
    squares = ((one[n].double() - t.double()).square().sum().item() for n, t in other.items() if t.is_floating_point())
    return sum(squares) ** 0.5


def target(config: MergeConfig, folder: Path, **parameters) -> Path:
    """Merge with other parameters: the candidate that a sweep has to find."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    merge_checkpoints(MergeConfig(**fields | {"parameters": parameters}), folder)
    return folder


def distance_command(folder: Path, other: Path) -> str:
    """Return a command that prints the distance of a model from another."""
    (folder / "distance.py").write_text(DISTANCE)
    return f"{sys.executable} -S -E {folder}/distance.py {{model}} {other}"


def table(out: Path):
    """Return what a sweep found, without times."""
    report = json.loads((out / "sweep.json").read_text())
    kept = ("number", "values", "scores", "failure", "rank", "front")
    return report["best"], [{name: candidate[name] for name in kept} for candidate in report["candidates"]]
