"""Candidates that are merged from the models use the thresholds and norms that earlier ones found."""

from pathlib import Path
from shutil import rmtree

import pytest
import torch
from safetensors.torch import load_file, save_file
from swept import models

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_tensors, sweep_checkpoints
from r_tsvm_kernels.methods import keeping, sce, sparsify
from r_tsvm_kernels.sweep import merger, plan_sweep

WEIGHTS = {"weight.expert0": [0.5, -1.0], "weight.expert1": [1.0, 2.0]}


@pytest.fixture
def selected(monkeypatch):
    """What elements were selected from, one entry for each selection."""
    calls = []
    for module, name, function in (
        (sparsify, "magnitude_select", sparsify.magnitude_select),
        (sce, "spread_select", sce.spread_select),
    ):

        def counted(tensor, *arguments, select=function, **options):
            calls.append(tensor)
            return select(tensor, *arguments, **options)

        monkeypatch.setattr(module, name, counted)
    return calls


def swept(config: MergeConfig, grids, out: Path, selected):
    """Sweep; return values and tensors of each candidate, and the number of selections for all of them."""
    merged, calls = [], []
    selected.clear()

    def evaluate(path):
        merged.append(load_file(path / "model.safetensors"))
        calls.append(len(selected))
        return 1.0

    found = sweep_checkpoints(config, out, grids=grids, evaluate=evaluate)
    trials = sorted(found.ranked, key=lambda trial: trial.number)
    assert not found.failed and not any(trial.from_parts for trial in trials)
    return [(trial.values, tensors) for trial, tensors in zip(trials, merged, strict=True)], calls[-1]


@pytest.mark.parametrize(
    ("method", "parameters", "grids"),
    [
        ("ties", {"density": 0.4}, WEIGHTS),
        ("ties", {"density": 0.4, "rescale": True}, WEIGHTS),
        ("ties", {}, {"weight.expert0": [0.5, 1.0], "density": [0.2, 0.6], "normalize": [True, False]}),
        ("breadcrumbs_ties", {"density": 0.4}, {"weight.expert0": [0.5, 1.0], "gamma": [0.01, 0.1]}),
        ("sce", {}, {"weight.expert1": [0.5, 1.0, -1.0], "select_topk": [0.3, 0.8, 1.0]}),
    ],
    ids=str,
)
def test_each_selection_is_made_once(method, parameters, grids, tmp_path, selected):
    """The candidates are those of merges alone, to the bit, and each selects nothing that was selected before."""
    config = models(tmp_path / "in", method, **parameters)
    candidates, calls = swept(config, grids, tmp_path / "sweep", selected)
    selected.clear()
    for number, (values, tensors) in enumerate(candidates):
        weights = [values.get(f"weight.expert{task}", 1.0) for task in range(2)]
        others = {name: value for name, value in values.items() if not name.startswith("weight")}
        own = MergeConfig(
            method, base_model=config.base_model,
            models=[{"model": str(tmp_path / "in" / f"expert{task}"), "parameters": {"weight": weight}}
                    for task, weight in enumerate(weights)],
            **parameters | others,
        )  # fmt: skip
        merge_checkpoints(own, tmp_path / f"alone{number}")
        alone = load_file(tmp_path / f"alone{number}" / "model.safetensors")
        assert alone.keys() == tensors.keys()
        assert all(torch.equal(alone[name], tensors[name]) for name in alone)
    different = {tuple(sorted((n, v) for n, v in values.items() if n in ("density", "gamma", "select_topk")))
                 for values, _ in candidates}  # fmt: skip
    assert calls > 0 and calls * len(candidates) == len(selected) * len(different)


def test_packed_experts_and_filters_have_their_own_selections(tmp_path, selected):
    paths = [tmp_path / name for name in ("base", "expert0", "expert1")]
    for seed, path in enumerate(paths):
        path.mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.{n}": torch.randn(3, 6, 8, generator=generator) for i in range(2)
                   for n in ("mlp.experts.down_proj", "mlp.experts.up_proj")}  # fmt: skip
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    density = [{"filter": "up_proj", "value": 0.2}, {"value": [0.5, 0.9]}]
    config = MergeConfig("ties", base_model=str(paths[0]), models=[str(p) for p in paths[1:]], density=density)
    candidates, calls = swept(config, {"weight.expert0": [0.5, -1.0]}, tmp_path / "sweep", selected)
    assert calls > 0
    for number, (values, tensors) in enumerate(candidates):
        own = MergeConfig("ties", base_model=str(paths[0]), density=density, models=[
            {"model": str(paths[1]), "parameters": {"weight": values["weight.expert0"]}}, str(paths[2])])  # fmt: skip
        merge_checkpoints(own, tmp_path / f"alone{number}")
        alone = load_file(tmp_path / f"alone{number}" / "model.safetensors")
        assert all(torch.equal(alone[name], tensors[name]) for name in alone)


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_thresholds_of_parts_are_not_those_of_the_models(method):
    """The parts in a common basis are others in another mode, which their thresholds must follow."""
    base, found = torch.zeros(12, 8), {}
    tuned = [torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with keeping(found):
        merge_tensors(base, tuned, method, inner_method="ties", density=0.5, weight=[1.0, 1.0])
        assert not found
        merge_tensors(base, tuned, "ties", density=0.5, weight=[1.0, 1.0])
        assert len(found) == len(tuned)


def test_what_is_kept_is_bounded(tmp_path, selected, monkeypatch):
    """A search over a density finds new thresholds in every merge; the last ones stay."""
    config = models(tmp_path / "in", "ties")
    counts, limit = [], 20

    def counted(*arguments, **options):
        counts.append(len(own[0]))
        return merge_checkpoints(*arguments, **options)

    own = []
    monkeypatch.setattr(merger, "keeping", lambda found: (own.append(found), keeping(found))[1])
    monkeypatch.setattr(merger, "merge_checkpoints", counted)
    monkeypatch.setattr(merger, "_MOST_FOUND", limit)
    swept(config, {"density": [0.1, 0.3, 0.5, 0.7]}, tmp_path / "out", selected)
    assert 0 < counts[1] <= limit and counts[2:] == [limit, limit]


def test_a_callback_that_merges_other_models_shares_nothing_with_the_sweep(tmp_path):
    """Tensors of the same names and shapes, of models that are not those of the sweep."""
    config = models(tmp_path / "in", "ties", density=0.4)
    loaded = load_file(tmp_path / "in" / "base" / "model.safetensors")
    name = next(name for name, tensor in loaded.items() if tensor.ndim == 2)
    base, tuned = torch.zeros_like(loaded[name]), [torch.randn_like(loaded[name]) for _ in range(2)]
    own = {"name": name, "density": 0.4, "weight": [1.0, 1.0]}
    expected, got = merge_tensors(base, tuned, "ties", **own).weight, []

    def progress(state):
        got.append(merge_tensors(base, tuned, "ties", **own).weight)

    merging = merger.Merger(tmp_path / "work", merger.Resources(threads=1), progress)
    first, second = plan_sweep(config, grids=WEIGHTS).candidates[:2]
    for candidate, out in ((first, tmp_path / "first"), (second, tmp_path / "second")):
        merging.merge(candidate, out)
        merge_checkpoints(candidate.config, tmp_path / "alone", restart=True)
        alone, merged = (load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", out))
        assert all(torch.equal(alone[name], merged[name]) for name in alone)
        rmtree(tmp_path / "alone")
    assert got and all(torch.equal(weight, expected) for weight in got)
