"""Sweeps from end to end: the best is right, nothing is lost, failures are recorded."""

import fcntl
import itertools
import json
import logging
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from checkpoints import digest
from safetensors.torch import load_file, save_file
from swept import distance, distance_command, models, table, target

from r_tsvm_kernels import (
    ConfigError,
    EvaluationError,
    JournalError,
    MergeConfig,
    OutputBusyError,
    OutputExistsError,
    ResumeRefusedError,
    decompose_checkpoints,
    merge_checkpoints,
    sweep_checkpoints,
    verify_output,
)
from r_tsvm_kernels.sweep import candidates, folder, merger, plan_sweep, run

GRIDS = {"alpha": "0.2:1:0.2", "weight.expert0": [0.5, 1]}


@pytest.fixture
def config(tmp_path):
    return models(tmp_path / "in")


@pytest.fixture
def goal(config, tmp_path):
    """The merge that the sweeps look for: alpha 0.6, and weight 0.5 of the first model."""
    found = models(tmp_path / "same").model_copy(update={"models": config.models})
    entries = [{"model": config.models[0].model, "parameters": {"weight": 0.5}}, config.models[1].model]
    return target(MergeConfig(found.merge_method, base_model=config.base_model, models=entries),
                  tmp_path / "goal", alpha=0.6)  # fmt: skip


def sweep(config, out, **options):
    return sweep_checkpoints(config, out, **{"grids": GRIDS, "minimize": True, **options})


def test_the_best_is_found_and_stands_alone(config, goal, tmp_path):
    seen = []
    found = sweep(config, tmp_path / "out", evaluate=lambda path: distance(path, goal), progress=seen.append)
    assert found.best.values == {"alpha": 0.6, "weight.expert0": 0.5} and found.best.scores == {"score": 0.0}
    assert found.complete and found.total == 10 and not found.failed and found.scores == ("score",)
    assert [trial.number for trial in sorted(found.ranked, key=lambda t: t.number)] == list(range(1, 11))
    scores = [trial.scores["score"] for trial in found.ranked]
    assert scores == sorted(scores) and len(set(scores)) == 10
    assert verify_output(found.best_path).ok
    recipe = MergeConfig.from_yaml(tmp_path / "out" / "best.yaml")
    assert recipe.to_yaml() == (found.best_path / "merge_recipe.yaml").read_text()
    merge_checkpoints(recipe, tmp_path / "again")
    assert digest(tmp_path / "again")["model.safetensors"] == digest(found.best_path)["model.safetensors"]
    assert digest(goal)["model.safetensors"] == digest(found.best_path)["model.safetensors"]
    assert {path.name for path in found.path.iterdir()} == {
        "best", "best.yaml", "sweep.json", "sweep.html", "sweep_journal.jsonl", ".sweep.lock",
    }  # fmt: skip
    done = [state.done for state in seen if state.trial]
    assert done == list(range(1, 11)) and any(state.merge for state in seen) and seen[-1].total == 10
    assert repr(found).startswith("SweepResult(10 of 10 candidates, 0 failed, best alpha=0.6, weight.expert0=0.5: ")


def test_commands_and_functions_agree(config, goal, tmp_path):
    sweep(config, tmp_path / "one", evaluate=lambda path: distance(path, goal))
    sweep(config, tmp_path / "other", evaluate=distance_command(tmp_path, goal))
    (best, one), (other_best, other) = table(tmp_path / "one"), table(tmp_path / "other")
    assert best == other_best == 5
    assert [found["values"] for found in one] == [found["values"] for found in other]
    for a, b in zip(one, other, strict=True):
        assert b["scores"]["score"] == pytest.approx(a["scores"]["score"], rel=1e-6, abs=1e-9)


def test_a_second_run_does_nothing_and_a_changed_one_is_refused(config, goal, tmp_path):
    calls = []

    def evaluate(path):
        calls.append(path)
        return distance(path, goal)

    first = sweep(config, tmp_path / "out", evaluate=evaluate)
    before, modified = table(tmp_path / "out"), os.stat(first.best_path / "model.safetensors").st_mtime_ns  # noqa: PTH116
    assert len(calls) == 10
    again = sweep(config, tmp_path / "out", evaluate=evaluate)
    assert len(calls) == 10 and again.best == first.best and table(tmp_path / "out") == before
    assert os.stat(first.best_path / "model.safetensors").st_mtime_ns == modified  # noqa: PTH116

    other = config.model_copy(update={"parameters": {"normalize": True}})
    for changed, message in (
        ({"evaluate": lambda path: 1.0}, "evaluation: "),
        ({"grids": {"alpha": "0.2:1:0.4"}}, "varied: alpha was [0.2, 0.4, 0.6, 0.8, 1.0], is [0.2, 0.6, 1.0]"),
        ({"config": other}, "recipe: parameters was {}, is {'normalize': True}"),
    ):
        options = {"config": config, "evaluate": evaluate, **changed}
        with pytest.raises(ResumeRefusedError, match=r"other settings .*--restart") as caught:
            sweep(options.pop("config"), tmp_path / "out", **options)
        assert message in str(caught.value)
    assert table(tmp_path / "out") == before
    save_file(load_file(f"{config.base_model}/model.safetensors"), f"{config.base_model}/model.safetensors")
    with pytest.raises(ResumeRefusedError, match=r"the input .*base/model.safetensors changed"):
        sweep(config, tmp_path / "out", evaluate=evaluate)
    sweep(other, tmp_path / "out", evaluate=evaluate, restart=True)
    assert len(calls) == 20


def test_another_score_decides_without_a_new_evaluation(config, tmp_path):
    norm = {"score": ["size:max"]}

    def evaluate(path):
        size = sum(t.float().norm().item() for t in load_file(path / "model.safetensors").values())
        return {"size": size, "low": size}

    found = sweep(config, tmp_path / "out", evaluate=evaluate, **norm)
    assert found.scores == ("size", "low") and found.best.number == 10
    best = found.best_path / "merge_recipe.yaml"
    text = best.read_text()
    other = sweep(config, tmp_path / "out", evaluate=evaluate, score="low")
    assert other.scores == ("low", "size") and other.best.number == 1 and best.read_text() != text
    assert {trial.number for trial in found.front} == set(range(1, 11))  # each is better in one
    assert {trial.number for trial in other.front} == {1}
    with pytest.raises(ConfigError, match=r"no score 'sizes'; did you mean 'size'\?"):
        sweep(config, tmp_path / "out", evaluate=evaluate, score="sizes")


def test_interruptions_lose_nothing(config, goal, tmp_path):
    whole = sweep(config, tmp_path / "whole", evaluate=lambda path: distance(path, goal))
    calls = []

    def evaluate(path):
        calls.append(path)
        if len(calls) in (3, 6, 7):
            raise KeyboardInterrupt
        return distance(path, goal)

    evaluate.__qualname__ = "evaluate"
    for done in (2, 4, 4):
        with pytest.raises(KeyboardInterrupt, match=f"{done} of 10 candidates are done: run the same command again"):
            sweep(config, tmp_path / "out", evaluate=evaluate)
        assert not (tmp_path / "out" / "best").exists()
    found = sweep(config, tmp_path / "out", evaluate=evaluate)
    assert len(calls) == 10 + 3 and found.best.values == whole.best.values
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_failures_are_recorded_and_tried_again_on_request(config, goal, tmp_path):
    wrong, calls = {0.4: ValueError("<b>sad</b>"), 0.8: float("nan"), 1.0: "high"}, []

    def evaluate(path):
        alpha = MergeConfig.from_yaml(path / "merge_recipe.yaml").parameters["alpha"]
        calls.append(alpha)
        found = wrong.get(alpha, alpha)
        if isinstance(found, Exception):
            raise found
        return found

    found = sweep(config, tmp_path / "out", evaluate=evaluate, grids={"alpha": "0.2:1:0.2"})
    assert [trial.values["alpha"] for trial in found.ranked] == [0.2, 0.6]
    failures = {trial.values["alpha"]: trial.failure for trial in found.failed}
    assert failures[0.4] == "ValueError: <b>sad</b>" and "not finite" in failures[0.8] and "no number" in failures[1.0]
    assert "Traceback" in found.failed[0].stderr
    sweep(config, tmp_path / "out", evaluate=evaluate, grids={"alpha": "0.2:1:0.2"})
    assert len(calls) == 5
    wrong.clear()
    found = sweep(config, tmp_path / "out", evaluate=evaluate, grids={"alpha": "0.2:1:0.2"}, retry=True)
    assert calls[5:] == [0.4, 0.8, 1.0] and len(found.ranked) == 5 and not found.failed
    journal = (tmp_path / "out" / "sweep_journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 5 + 3


def test_if_all_fail_the_failures_can_be_read(config, tmp_path):
    def evaluate(path):
        raise OSError("no data")

    with pytest.raises(EvaluationError, match=r"all of 10 failed, the first one: OSError: no data; see .*sweep.html"):
        sweep(config, tmp_path / "out", evaluate=evaluate)
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert report["best"] is None and len(report["candidates"]) == 10
    assert "OSError: no data" in (tmp_path / "out" / "sweep.html").read_text()
    assert not (tmp_path / "out" / "best").exists()


def test_a_merge_that_overflows_is_a_failure(config, tmp_path):
    found = sweep(config, tmp_path / "out", evaluate=lambda path: 1.0,
                  grids={"weight": [30], "alpha": "1,3e38,2"})  # fmt: skip
    (failed,) = found.failed
    assert (
        failed.values == {"weight": 30, "alpha": 3e38}
        and failed.failure.startswith("merge: ")
        and len(found.ranked) == 2
    )


def test_scores_of_other_names_are_a_failure(config, tmp_path):
    names = iter(["a", "a", "b", "a", "a"])
    found = sweep(config, tmp_path / "out", evaluate=lambda path: {next(names): 1.0}, grids={"alpha": "0.2:1:0.2"})
    (failed,) = found.failed
    assert failed.number == 3 and failed.failure == "other scores than before: expected a, got b"


def test_a_time_limit(config, goal, tmp_path, monkeypatch):
    evaluated, looks = [], itertools.count()  # at the clock, which hardly moves but for evaluations

    def evaluate(path):
        evaluated.append(path)
        return distance(path, goal)

    clock = SimpleNamespace(monotonic=lambda: 0.3 * len(evaluated) + 1e-5 * next(looks))
    monkeypatch.setattr(run, "time", clock)
    found = sweep(config, tmp_path / "out", evaluate=evaluate, time_limit=0.5)
    assert not found.complete and 2 <= len(found.ranked) <= 3 and found.best_path.is_dir()
    assert json.loads(found.report_path.read_text())["complete"] is False
    whole = sweep(config, tmp_path / "out", evaluate=evaluate)
    assert whole.complete and len(whole.ranked) == 10 and whole.best.number == 5
    assert MergeConfig.from_yaml(whole.best_path / "merge_recipe.yaml").parameters["alpha"] == 0.6
    with pytest.raises(EvaluationError, match="none was tried in time"):
        sweep(config, tmp_path / "none", evaluate=evaluate, time_limit="0.000001s")


def test_evaluations_at_a_time(config, goal, tmp_path):
    sweep(config, tmp_path / "one", evaluate=lambda path: distance(path, goal))
    running, most, places, lock = 0, 0, set(), threading.Lock()
    together = threading.Barrier(3, timeout=60)

    def evaluate(path):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            places.add(path)
        before = distance(path, goal)
        if len(places) < 3 or running == 3:
            together.wait()  # three are evaluated at a time, or this fails
        time.sleep(0.02)
        with lock:
            running -= 1
        assert distance(path, goal) == before  # nobody else has merged into this folder meanwhile
        return before

    found = sweep(config, tmp_path / "three", evaluate=evaluate, jobs=3, grids={"alpha": "0.2:1.8:0.2"})
    assert most == 3 and len(places) == 3 and len(found.ranked) == 9 and not found.failed
    sweep(config, tmp_path / "jobs", evaluate=distance_command(tmp_path, goal), jobs=3)
    assert [c["values"] for c in table(tmp_path / "jobs")[1]] == [c["values"] for c in table(tmp_path / "one")[1]]
    assert table(tmp_path / "jobs")[0] == 5


def test_commands_that_take_too_long(config, tmp_path):
    script = tmp_path / "eval.sh"
    script.write_text('grep -q "alpha: 0.4" $1/merge_recipe.yaml && sleep 600; echo 1\n')
    found = sweep(config, tmp_path / "out", evaluate=f"sh {script} {{model}}", evaluation_timeout="1s", jobs=2,
                  grids={"alpha": "0.2,0.4,0.6"})  # fmt: skip
    (failed,) = found.failed
    assert failed.values == {"alpha": 0.4} and failed.failure == "took longer than 1 s and was stopped"


# --- parts


def merges(monkeypatch):
    """Record what is decomposed and merged."""
    events = []
    for name in ("decompose_checkpoints", "merge_checkpoints"):
        real = getattr(merger, name)

        def recorded(config, out, *, name=name, real=real, **options):
            events.append((name.partition("_")[0], config))
            return real(config, out, **options)

        monkeypatch.setattr(merger, name, recorded)
    return events


@pytest.mark.parametrize("method", ["tsvm", "rtsvm", "star"])
def test_one_decomposition_serves_all_weights(method, tmp_path, monkeypatch):
    config = models(tmp_path / "in", method)
    goal = target(config, tmp_path / "goal", alpha=0.6)
    events = merges(monkeypatch)
    grids = {"alpha": "0.2:1:0.2", "weight.expert0": [0.5, 1], "weight.expert1": [0.5, 1]}
    found = sweep(config, tmp_path / "parts", evaluate=lambda path: distance(path, goal), grids=grids)
    assert [kind for kind, _ in events] == ["decompose", *["merge"] * 20]
    assert all(config.parts for kind, config in events if kind == "merge")
    monkeypatch.setattr(candidates, "free_parameters", lambda config: frozenset())
    del events[:]
    anew = sweep(config, tmp_path / "anew", evaluate=lambda path: distance(path, goal), grids=grids)
    assert [kind for kind, _ in events] == ["merge"] * 20 and not any(config.parts for _, config in events)
    assert found.best.values == anew.best.values == {"alpha": 0.6, "weight.expert0": 1, "weight.expert1": 1}
    assert all(trial.from_parts for trial in found.ranked) and not any(trial.from_parts for trial in anew.ranked)
    by_number = {trial.number: trial.scores["score"] for trial in anew.ranked}
    for trial in found.ranked:
        assert trial.scores["score"] == pytest.approx(by_number[trial.number], abs=1e-4 * max(by_number.values()))
    best = digest(found.best_path)["model.safetensors"]
    assert best == digest(anew.best_path)["model.safetensors"] == digest(goal)["model.safetensors"]


def test_each_decomposition_is_made_once_and_only_where_it_is_shared(tmp_path, monkeypatch):
    config = models(tmp_path / "in", "core_space")
    events = merges(monkeypatch)
    grids = {"alpha": [0.5, 1], "inner_method": "tsvm,ties,task_arithmetic", "weight": [0.5, 1]}
    plan = plan_sweep(config, grids=grids)
    linear = [
        group.values["inner_method"] for group in plan.groups if group.from_parts and "weight" not in group.values
    ]
    found = sweep(config, tmp_path / "out", evaluate=lambda path: 1.0, grids=grids)
    decomposed = [config.parameters["inner_method"] for kind, config in events if kind == "decompose"]
    assert decomposed == linear and "tsvm" in linear and "ties" not in linear
    assert all(trial.from_parts for trial in found.ranked)
    updates = 2 * (3 - len(linear))  # of the others, one for each weight
    assert plan.groups_with_parts == len(linear) + updates and plan.merged_anew == 0
    assert [kind for kind, _ in events].count("merge") == 12 + updates
    assert not list(tmp_path.rglob("parts-*"))

    del events[:]
    alone = sweep(models(tmp_path / "in2", "tsvm"), tmp_path / "alone", evaluate=lambda path: 1.0,
                  grids={"mode": "exact,fast", "alpha": [1]})  # fmt: skip
    assert [kind for kind, _ in events] == ["merge"] * 2 and not any(trial.from_parts for trial in alone.ranked)


def test_parts_that_cancel_each_other_are_merged_anew(tmp_path, monkeypatch):
    config = models(tmp_path / "in", "tsvm")

    def refuse(*arguments, **options):
        from r_tsvm_kernels import ConvergenceError

        if arguments[0].parts:
            raise ConvergenceError("the parts cancel each other")
        return merge_checkpoints(*arguments, **options)

    monkeypatch.setattr(merger, "merge_checkpoints", refuse)
    found = sweep(config, tmp_path / "out", evaluate=lambda path: 1.0, grids={"alpha": [0.5, 1]})
    assert len(found.ranked) == 2 and not any(trial.from_parts for trial in found.ranked)


def test_slices_and_their_own_values(config, tmp_path):
    models = [entry.model for entry in config.models]
    half = [{"sources": [{"model": model, "layer_range": [layer, layer + 1]} for model in models]} for layer in (0, 1)]
    recipe = {"merge_method": "tsvm", "base_model": config.base_model, "slices": half}
    found = sweep(MergeConfig.from_dict(recipe), tmp_path / "out", evaluate=lambda path: 1.0, grids={"alpha": [0.5, 1]})
    assert len(found.ranked) == 2 and not any(trial.from_parts for trial in found.ranked)
    assert verify_output(found.best_path).ok
    for place in (half[0], half[1]["sources"][0]):
        place["parameters"] = {"weight": 0.5}
        with pytest.raises(ConfigError, match="weight: a slice or module of the recipe has its own value"):
            plan_sweep(MergeConfig.from_dict(recipe), grids={"weight": [0.5, 1]})
        plan_sweep(MergeConfig.from_dict(recipe), grids={"alpha": [0.5, 1]})
        del place["parameters"]


def test_recipes_of_several_merges_are_refused(config):
    documents = [
        {"name": "first", "merge_method": "linear", "models": [entry.model for entry in config.models]},
        {"merge_method": "ties", "base_model": config.base_model, "models": ["first", config.models[0].model]},
    ]
    recipe = MergeConfig.from_documents(documents)
    with pytest.raises(ConfigError, match="a recipe of one merge, and this one has others before it: first; make"):
        plan_sweep(recipe, grids={"alpha": [0.5, 1]})


def test_parts_that_a_recipe_names_are_used(config, tmp_path):
    spectral = MergeConfig("tsvm", base_model=config.base_model, models=config.models)
    decompose_checkpoints(spectral, tmp_path / "parts")
    recipe = spectral.model_copy(update={"parts": str(tmp_path / "parts")})
    found = sweep(recipe, tmp_path / "out", evaluate=lambda path: 1.0)
    assert len(found.ranked) == 10 and MergeConfig.from_yaml(tmp_path / "out" / "best.yaml").parts == recipe.parts
    with pytest.raises(ConfigError, match="the parts are of another recipe"):
        sweep(recipe, tmp_path / "other", evaluate=lambda path: 1.0, grids={"exclude_keys": [["a"], ["*attn*"]]})


def test_costs_of_a_plan(tmp_path, config):
    plan = plan_sweep(config, grids=GRIDS)
    assert (plan.total, plan.groups_with_parts, plan.merged_anew, plan.free) == (10, 0, 10, ())
    assert plan.bytes_read == 10 * plan.merge.bytes_read and plan.flops > 0
    spectral = plan_sweep(models(tmp_path / "in2", "tsvm"), grids=GRIDS)
    (group,) = spectral.groups
    assert spectral.free == ("alpha", "weight.expert0") and group.candidates == 10 and group.from_parts
    assert spectral.flops == group.flops and spectral.groups_with_parts == 1 and group.bytes_of_parts > 0
    assert spectral.bytes_read == group.bytes_read + 10 * group.bytes_per_candidate
    assert [candidate.number for candidate in spectral.candidates] == list(range(1, 11))


# --- requests that are refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": {}}, "nothing to vary"),
        ({"grids": {"alhpa": "1"}}, "did you mean 'alpha'"),  # codespell:ignore
        ({"ranges": {"alpha": "0:1"}}, "only a search has them"),
        ({"trials": 5}, "trials: only a search has them"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"time_limit": "soon"}, "duration such as 2h"),
        ({"evaluation_timeout": 5}, "a function cannot be stopped"),
        ({"evaluate": "echo 1"}, "a command with {model} in it"),
        (
            {"search": "random", "ranges": {"alpha": "0:1"}, "trials": 3, "grids": {}},
            "search must be one of tpe, cmaes",
        ),
        ({"search": "tpe", "trials": 3}, "a search needs a range"),
        ({"search": "tpe", "ranges": {"weight": "0:1"}}, "a search needs the number of trials"),
        ({"search": "tpe", "ranges": {"weight": "0:1"}, "trials": 3, "retry": True}, "retry is for grids"),
        ({"grids": {"alpha": range(101), "weight.expert0": range(100)}}, "10000 candidates, got 10100"),
    ],
)
def test_invalid_requests(config, tmp_path, options, message):
    with pytest.raises(ConfigError) as caught:
        sweep(config, tmp_path / "out", **{"evaluate": lambda path: 1.0, **options})
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(OutputExistsError, match="choose another output"):
            sweep(config, tmp_path / name, evaluate=lambda path: 1.0, restart=True)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"


def test_one_sweep_at_a_time(config, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputBusyError, match="another sweep into this folder"):
            sweep(config, tmp_path / "out", evaluate=lambda path: 1.0)
    sweep(config, tmp_path / "out", evaluate=lambda path: 1.0)


def test_a_damaged_journal_is_refused(config, tmp_path):
    sweep(config, tmp_path / "out", evaluate=lambda path: 1.0)
    journal = tmp_path / "out" / "sweep_journal.jsonl"
    whole = journal.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"\n") + 30] ^= 1
    journal.write_bytes(damaged)
    with pytest.raises(JournalError, match=r"line 2 is damaged; .*--restart"):
        sweep(config, tmp_path / "out", evaluate=lambda path: 1.0)
    sweep(config, tmp_path / "out", evaluate=lambda path: 1.0, restart=True)


def test_notes_are_said_once(tmp_path, caplog):
    config = models(tmp_path / "in")
    for index, model in enumerate((config.base_model, *(entry.model for entry in config.models))):
        with open(f"{model}/config.json", "w") as file:  # noqa: PTH123
            json.dump({"model_type": "toy", "rope_theta": 1000.0 * (index + 1)}, file)
    with caplog.at_level(logging.WARNING, "r_tsvm_kernels"):
        sweep(config, tmp_path / "out", evaluate=lambda path: 1.0)
    notes = [record.getMessage() for record in caplog.records if "rope_theta" in record.getMessage()]
    assert len(notes) == len(set(notes)) > 0


def test_what_the_trials_say(config, tmp_path):
    found = sweep(config, tmp_path / "out", evaluate=lambda path: torch.tensor(0.5), grids={"alpha": [0.1]})
    assert repr(found.best) == "Trial(1: alpha=0.1: score=0.5)"


def test_parts_that_a_kill_has_cut_off_are_not_used(tmp_path, monkeypatch):
    config = models(tmp_path / "in", "tsvm")
    removed = []

    def killed(path, **options):
        if path.name.endswith(".gone") and path.exists():
            next(path.glob("*.safetensors")).unlink()
            removed.append(path)
            raise KeyboardInterrupt
        rmtree(path, **options)

    rmtree = folder.shutil.rmtree
    monkeypatch.setattr(folder.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, tmp_path / "out", evaluate=len_of, grids={"alpha": [0.5, 1]})
    monkeypatch.setattr(folder.shutil, "rmtree", rmtree)
    found = sweep(config, tmp_path / "out", evaluate=len_of, grids={"alpha": [0.5, 1]})
    assert removed and len(found.ranked) == 2 and not list(tmp_path.rglob("*.gone"))


def len_of(path):
    return len(path.name)
