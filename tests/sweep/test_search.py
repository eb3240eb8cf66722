"""Searches with optuna: they find what a grid would, and go on as if they had not been interrupted."""

import importlib.util
import subprocess
import sys

import pytest
from swept import distance, models, target

from r_tsvm_kernels import ConfigError, IntegrationError, MergeConfig, ResumeRefusedError, sweep_checkpoints
from r_tsvm_kernels.sweep import merger, plan_sweep
from r_tsvm_kernels.sweep.axes import grid_axis, range_axis

installed = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None or importlib.util.find_spec("cmaes") is None,
    reason="optuna and cmaes are not installed: pip install '.[search]'",
)
CONFIG = MergeConfig("rtsvm", base_model="b", models=["m", "n"])


@pytest.fixture
def config(tmp_path):
    return models(tmp_path / "in")


@pytest.fixture
def goal(config, tmp_path):
    return target(config, tmp_path / "goal", alpha=0.7, weight=0.5)


def search(config, out, goal, **options):
    def evaluate(path):
        return distance(path, goal)

    ranges = {"alpha": "0.1:2", "weight.expert0": "0:1"}
    given = {"ranges": ranges, "search": "tpe", "trials": 15, "minimize": True, "evaluate": evaluate, **options}
    return sweep_checkpoints(config, out, **given)


def values(result):
    return [trial.values for trial in sorted((*result.ranked, *result.failed), key=lambda trial: trial.number)]


@installed
@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_search_closes_in_and_its_seed_decides(config, goal, tmp_path, name):
    one = search(config, tmp_path / "one", goal, search=name, trials=30)
    same = search(config, tmp_path / "same", goal, search=name, trials=30)
    other = search(config, tmp_path / "other", goal, search=name, trials=30, seed=1)
    assert values(one) == values(same) != values(other)
    assert len(one.ranked) == 30 and all(0.1 <= t.values["alpha"] <= 2 for t in one.ranked)
    first, last = ([t.scores["score"] for t in one.ranked if lo <= t.number < lo + 10] for lo in (1, 21))
    assert min(last) < min(first) or sum(last) < 0.7 * sum(first)


@installed
@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_an_interruption_changes_nothing(config, goal, tmp_path, name):
    whole = search(config, tmp_path / "whole", goal, search=name)
    calls = 0

    def evaluate(path):
        nonlocal calls
        calls += 1
        if calls in (4, 5, 13):
            raise KeyboardInterrupt
        if calls == 8:
            raise ValueError("it fails now and then")
        return distance(path, goal)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(config, tmp_path / "out", goal, search=name, evaluate=evaluate)
    found = search(config, tmp_path / "out", goal, search=name, evaluate=evaluate)
    assert calls == 15 + 3 and len(found.failed) == 1
    failed = found.failed[0].number
    assert values(found)[:failed] == values(whole)[:failed]  # the failure leads it to other values
    again = search(config, tmp_path / "again", goal, search=name,
                   evaluate=lambda path: distance(path, goal), trials=4)  # fmt: skip
    assert values(again) == values(whole)[:4]


@installed
def test_more_trials_go_on(config, goal, tmp_path):
    whole = search(config, tmp_path / "whole", goal)
    search(config, tmp_path / "out", goal, trials=6)
    found = search(config, tmp_path / "out", goal, trials=15)
    assert values(found) == values(whole) and found.best.values == whole.best.values
    with pytest.raises(ConfigError, match="15 have begun already, got 7"):
        search(config, tmp_path / "out", goal, trials=7)
    for changed in ({"seed": 5}, {"search": "cmaes"}, {"ranges": {"alpha": "0.1:3"}}, {"minimize": False}, {"jobs": 2}):
        with pytest.raises(ResumeRefusedError, match="other settings"):
            search(config, tmp_path / "out", goal, **changed)


@installed
def test_choices_and_parts(tmp_path, monkeypatch):
    config = models(tmp_path / "in", "tsvm")
    goal = target(config, tmp_path / "goal", alpha=0.7)
    decomposed = []
    real = merger.decompose_checkpoints
    monkeypatch.setattr(
        merger, "decompose_checkpoints", lambda *a, **k: (decomposed.append(a[0].parameters["mode"]), real(*a, **k))
    )
    found = search(config, tmp_path / "out", goal, ranges={"alpha": "0.1:2"}, grids={"mode": "exact,fast"}, trials=12)
    assert sorted(decomposed) == ["exact", "fast"] and all(trial.from_parts for trial in found.ranked)
    assert {trial.values["mode"] for trial in found.ranked} == {"exact", "fast"}
    del decomposed[:]
    config = models(tmp_path / "in2", "star")  # the parts of each value of `eta` are others
    found = search(config, tmp_path / "out2", goal, ranges={"alpha": "0.1:2", "eta": "20:90"}, trials=4)
    assert not decomposed and not any(trial.from_parts for trial in found.ranked)


@installed
def test_values_that_come_again_are_not_run_again(tmp_path):
    config = models(tmp_path / "in")
    calls = []

    def evaluate(path):
        recipe = MergeConfig.from_yaml(path / "merge_recipe.yaml")
        calls.append(recipe.parameters["normalize"])
        return float(len(calls))

    options = {"ranges": {"alpha": "0.5:0.5000000000000001"}, "grids": {"normalize": "true,false"}, "trials": 12}
    found = search(config, tmp_path / "out", None, evaluate=evaluate, **options)
    assert found.complete and len(calls) == len(found.ranked) <= 4
    journal = (tmp_path / "out" / "sweep_journal.jsonl").read_text()
    assert journal.count('"asked"') == 12 and journal.count('"trial"') == len(calls)
    again = search(config, tmp_path / "out", None, evaluate=evaluate, **options)
    assert len(calls) == len(again.ranked) == len(found.ranked)


@installed
def test_several_jobs(config, goal, tmp_path):
    found = search(config, tmp_path / "out", goal, jobs=3, trials=12)
    assert len(found.ranked) == 12 and sorted(t.number for t in found.ranked) == list(range(1, 13))
    again = search(config, tmp_path / "out", goal, jobs=3, trials=14)
    assert values(again)[:12] == values(found) and len(again.ranked) == 14


@pytest.mark.parametrize(
    ("ranges", "grids", "message"),
    [
        ({"alpha": "0.1:1"}, {}, "got a single range; use tpe"),
        ({"alpha": "0.1:1", "weight": "0:1"}, {"mode": "exact,fast"}, "mode: a list of values; use tpe"),
    ],
)
def test_a_plan_refuses_what_a_search_does_not_take(ranges, grids, message):
    with pytest.raises(ConfigError, match=message):
        plan_sweep(CONFIG, ranges=ranges, grids=grids, search="cmaes", trials=3)


@installed
def test_what_a_search_takes():
    from r_tsvm_kernels.sweep.search import Study

    alpha, rank = range_axis(CONFIG, "alpha", "0.1:1:log"), grid_axis(CONFIG, "rank", "full,sparsity")
    with pytest.raises(ConfigError, match="rank: a list of values; use tpe"):
        Study("cmaes", [alpha, range_axis(CONFIG, "weight.m", "0:1"), rank], 0)
    with pytest.raises(ConfigError, match="got a single range; use tpe"):
        Study("cmaes", [alpha], 0)
    study = Study("tpe", [alpha, rank], 0)
    asked = [study.ask() for _ in range(20)]
    assert {values["rank"] for values in asked} == {"full", "sparsity"}
    assert all(0.1 <= values["alpha"] <= 1 for values in asked)
    whole = range_axis(MergeConfig("karcher", models=["a", "b"]), "max_iter", "5:9")
    assert {type(Study("tpe", [whole], 0).ask()["max_iter"])} == {int}


def test_without_optuna_the_message_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "from r_tsvm_kernels.sweep.search import Study, versions\n"
        "from r_tsvm_kernels import IntegrationError\n"
        "for call in (lambda: Study('tpe', [], 0), lambda: versions('cmaes')):\n"
        "    try:\n"
        "        call()\n"
        "    except IntegrationError as error:\n"
        "        print(error, error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "needs optuna, which is not installed: pip install 'r_tsvm_kernels[search]' 2"
    assert done.stdout.splitlines() == [f"the search {name} {expected}" for name in ("tpe", "cmaes")]
    assert issubclass(IntegrationError, ImportError)
