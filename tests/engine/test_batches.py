"""Matrices of several tensors in one batch: which, the same bytes in any circumstances, memory, errors."""

import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save
from compare import relative_error, same_bits
from memory import Allocations
from safetensors.torch import load_file

from r_tsvm_kernels import (
    MemoryBudgetError,
    MergeConfig,
    NonFiniteError,
    merge_checkpoints,
    merge_state_dicts,
    merge_tensors,
    verify_output,
)
from r_tsvm_kernels.engine import job, local, make_schedule, smallest_schedule
from r_tsvm_kernels.engine.ray_engine import _groups
from r_tsvm_kernels.engine.tiles import Tile, merge_group, read_tile
from r_tsvm_kernels.merge import BatchMember, merge_batch
from r_tsvm_kernels.methods import tsvm
from r_tsvm_kernels.plan import batches, make_plan

SHAPES = {
    "embed": (50, 16),
    **{f"layers.{i}.{name}": shape for i in range(3) for name, shape in
       {"k": (24, 40), "norm": (40,), "o": (40, 24), "v": (24, 40)}.items()},
}  # fmt: skip
GROUPS = [
    ("embed",),
    ("layers.0.k", "layers.0.v", "layers.1.k"),
    ("layers.0.norm",),
    ("layers.0.o", "layers.1.o", "layers.2.o"),
    ("layers.1.norm",),
    ("layers.1.v", "layers.2.k", "layers.2.v"),
    ("layers.2.norm",),
]
METHODS = {"tsvm": {}, "rtsvm": {"preset": "weighted"}, "resm": {"density": 0.5}}


@pytest.fixture(autouse=True)
def batches_of_three(monkeypatch):
    monkeypatch.setitem(tsvm.BATCH_ELEMENTS, "cpu", 3 * 2 * (24 * 40 + 24**2))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = [{n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)]
    paths = [save(folder / str(i), tensors, shards=i + 1) for i, tensors in enumerate([base, *tuned])]
    return paths, base, tuned


def config(paths, method="tsvm", solver="products", **fields):
    return MergeConfig(method, base_model=paths[0], models=paths[1:], solver=solver, **fields)


def load(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def groups_of(config):
    return batches(make_plan(config, 10**9), "cpu")


def test_which_tensors_are_merged_together(models, monkeypatch):
    paths, _, _ = models
    assert groups_of(config(paths)) == groups_of(config(paths, "rtsvm", preset="weighted")) == GROUPS
    alone = [(name,) for name in SHAPES]
    assert groups_of(config(paths, solver="eigen")) == alone
    assert groups_of(MergeConfig("ties", base_model=paths[0], models=paths[1:])) == alone
    excluded = groups_of(config(paths, exclude=["*.1.*"], exclude_keys=["layers.2.k"]))
    assert ("layers.0.k", "layers.0.v", "layers.2.v") in excluded and ("layers.2.k",) in excluded
    # Options of their own, such as those of a gradient, and smaller ones by a smaller workspace.
    assert groups_of(config(paths, alpha=[0.5, 1.0])) == [("embed",), ("layers.0.k", "layers.0.v"), ("layers.0.norm",),
        ("layers.0.o",), ("layers.1.k", "layers.1.v"), ("layers.1.norm",), ("layers.1.o",),
        ("layers.2.k", "layers.2.v"), ("layers.2.norm",), ("layers.2.o",)]  # fmt: skip
    assert groups_of(config(paths, workspace="48MB"))[1] == ("layers.0.k", "layers.0.v")
    assert groups_of(config(paths, workspace="1MB")) == alone


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_in_any_circumstances(models, tmp_path, method):
    paths, base, tuned = models
    recipe = config(paths, method, out_dtype="bfloat16", **METHODS[method])
    expected = {}
    for group in GROUPS:
        members = [BatchMember(base[n], [t[n] for t in tuned], n, out_dtype=torch.bfloat16) for n in group]
        found = merge_batch(members, recipe) if len(group) > 1 else [
            merge_tensors(base[n], [t[n] for t in tuned], recipe, name=n) for n in group]  # fmt: skip
        expected |= {name: result.weight for name, result in zip(group, found, strict=True)}
    smallest = smallest_schedule(make_plan(recipe, 4000)).peak_host_bytes
    for index, options in enumerate([{"threads": 3}, {"memory": smallest}]):
        out, done = tmp_path / str(index), []
        result = merge_checkpoints(recipe, out, shard_size=4000, progress=done.append, **options)
        merged = load(out)
        assert [name for name in SHAPES if not same_bits(merged[name], expected[name])] == []
        assert (
            list(result.reports) == list(SHAPES)
            and sorted(own.tensor for own in done) == sorted(SHAPES)
            and verify_output(out).ok
        )
        for group in GROUPS:
            reports = [result.reports[name] for name in group]
            assert len({report.seconds for report in reports}) == 1
            assert [report.shape for report in reports] == [SHAPES[name] for name in group]
            assert all(report.stages.keys() >= {"read", "merge", "write"} for report in reports)
    for name, tensor in merge_state_dicts(base, tuned, recipe).state_dict.items():  # one by one
        assert relative_error(merged[name], tensor) < 1e-4, name


def test_batches_of_one_are_merged_as_in_memory(models, tmp_path, monkeypatch):
    paths, base, tuned = models
    monkeypatch.setitem(tsvm.BATCH_ELEMENTS, "cpu", 1)
    merge_checkpoints(config(paths), tmp_path / "out")
    expected, merged = merge_state_dicts(base, tuned, config(paths)).state_dict, load(tmp_path / "out")
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stopped_after", [3, 5, 9])
def test_killed_within_a_batch_and_resumed(models, tmp_path, monkeypatch, stopped_after):
    paths, _, _ = models
    recipe, killed = config(paths, "rtsvm", preset="weighted"), tmp_path / "killed"
    merge_checkpoints(recipe, tmp_path / "whole", threads=1)
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    record, left = job.MergeJob.record, iter(range(stopped_after - 1))

    def record_and_copy(own, entry):
        record(own, entry)
        if next(left, None) is None and not (tmp_path / ".killed.partial").exists():  # what a kill leaves
            shutil.copytree(own.stage.folder, tmp_path / ".killed.partial")

    with monkeypatch.context() as patch:
        patch.setattr(job.MergeJob, "record", record_and_copy)
        merge_checkpoints(recipe, tmp_path / "copied", threads=1)
    written = []
    monkeypatch.setattr(local._Pipeline, "_write_in_order", counted(local._Pipeline._write_in_order, written))
    result = merge_checkpoints(recipe, killed, resume=True, threads=2)
    assert result.resumed == stopped_after and len(written) == len(SHAPES) - stopped_after
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert verify_output(killed).ok


def counted(write, written):
    def wrapped(own, merged):
        written.append(merged.tile.name)
        write(own, merged)

    return wrapped


def test_a_matrix_that_cannot_join_and_one_that_cannot_be_merged(models, tmp_path):
    _, base, tuned = models
    tuned = [{**weights, "layers.1.k": base["layers.1.k"]} for weights in tuned]  # not changed by any task
    paths = [save(tmp_path / str(i), weights) for i, weights in enumerate([base, *tuned])]
    merge_checkpoints(config(paths), tmp_path / "out")
    merged = load(tmp_path / "out")
    assert same_bits(merged["layers.1.k"], base["layers.1.k"]) and not same_bits(
        merged["layers.0.v"], base["layers.0.v"]
    )
    tuned[1] = {**tuned[1], "layers.0.v": tuned[1]["layers.0.v"].clone().fill_(torch.nan)}
    paths[2] = save(tmp_path / "nan", tuned[1])
    with pytest.raises(NonFiniteError, match=r"layers\.0\.v of .*nan"):
        merge_checkpoints(config(paths), tmp_path / "bad")


def test_the_budget_holds_a_batch_and_its_composition_does_not_depend_on_it(models):
    plan = make_plan(config(models[0]), 10**9)
    for on_gpu in (False, True):
        smallest, roomy = smallest_schedule(plan, on_gpu), make_schedule(plan, 2, on_gpu=on_gpu)
        assert smallest.groups == roomy.groups
        needs = [smallest.needs(group) for group in smallest.groups]
        assert smallest.read_bytes == max(need.inputs for need in needs)
        assert roomy.read_bytes >= max(a.inputs + b.inputs for a, b in pairwise(needs))
        device = max(need.inputs + need.work for need in needs)
        assert smallest.device_bytes == (device if on_gpu else 0)
    host = smallest_schedule(plan).peak_host_bytes
    with pytest.raises(
        MemoryBudgetError, match=r"above all layers.0.k, layers.0.v, layers.1.k; .* smaller `workspace`"
    ):
        make_schedule(plan, 1, host - 1)
    small = smallest_schedule(make_plan(config(models[0], workspace="1MB"), 10**9))
    assert small.peak_host_bytes < host


def test_a_batch_takes_no_more_memory_than_planned(tmp_path, monkeypatch):
    monkeypatch.setitem(tsvm.BATCH_ELEMENTS, "cpu", 3 * 2 * (96 * 128 + 96**2))
    tensors = {f"layers.{i}.k": torch.randn(96, 128) for i in range(3)}
    paths = [save(tmp_path / "base", tensors)]
    paths += [save(tmp_path / str(i), {n: t + torch.randn(96, 128) for n, t in tensors.items()}) for i in range(2)]
    plan = make_plan(config(paths), 10**9)
    found = smallest_schedule(plan)
    tiles = [Tile(name, 0, 1, 0, 96) for name in tensors]
    assert found.groups == [tuple(tensors)]
    with Allocations() as allocations:
        inputs = [read_tile(plan, tile) for tile in tiles]
        merge_group(plan, tiles, inputs, torch.device("cpu"))
    needs = found.needs(found.groups[0])
    assert needs.inputs + 4 * 2 * 96 * 128 * 3 < allocations.peak < needs.inputs + needs.work


def test_workers_of_ray_get_whole_batches(models):
    plan = make_plan(config(models[0]), 10**9)
    schedule = make_schedule(plan, 1)
    order = [name for group in GROUPS for name in group]
    for slots in (1, 2, 100):
        pending = SimpleNamespace(plan=plan, pending=list(SHAPES))
        tasks = list(_groups(pending, schedule, slots))
        assert [name for names in tasks for name in names] == order
        assert all(set(group) <= set(names) or set(group).isdisjoint(names) for group in GROUPS for names in tasks)
    resumed = SimpleNamespace(plan=plan, pending=["layers.0.v", "layers.2.norm"])
    assert list(_groups(resumed, schedule, 100)) == [["layers.0.v"], ["layers.2.norm"]]
