"""The quality study runs, continues where it was stopped, and its tables are those of its results."""

import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.quality import further, suite_dpo, suite_lora
from benchmarks.quality.analysis import chosen, comparable, conditions, load
from benchmarks.quality.records import records_of, rows_of
from benchmarks.quality.study import (
    CHOICE_SEEDS,
    CHOICE_SUITES,
    HELD_OUT_SEEDS,
    SUITES,
    TABLE,
    at_alpha,
    candidates,
    label,
    rtsvm_defaults,
    variants,
)
from benchmarks.quality.table import text
from benchmarks.quality.training import Transformer, score, train_family
from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.bench import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def run(program, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.quality.{program}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    done = run("run", "--quick", "--suites", "digits", "--seeds", "10", "0", "--workers", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "digits, seed 10:" in done.stdout and "digits, seed 0:" in done.stdout
    return out


def test_quick_results_are_complete_and_sane(quick):
    seeds = records_of(read_rows(quick / "digits.json"))
    assert list(seeds) == ["0", "10"]
    choice, held_out = seeds["0"], seeds["10"]
    assert list(choice["methods"]) == ["tsvm"] and len(choice["rtsvm"]) >= 3
    assert len(held_out["methods"]) == 14 and "start" in held_out["rtsvm"]
    experts = [expert["accuracy"][task] for task, expert in enumerate(held_out["experts"])]
    assert min(experts) > max(held_out["base"]["accuracy"])  # they have learned something
    for entry in (*held_out["methods"].values(), *held_out["rtsvm"].values()):
        assert sum(entry["tuned"]["validation"]) >= sum(entry["default"]["validation"])
        assert all(0 <= value <= 100 for value in entry["default"]["accuracy"] + entry["tuned"]["accuracy"])
    assert "accuracy" not in choice["rtsvm"]["start"]["default"]  # nothing is tested where defaults are chosen


def test_records_are_the_same_from_rows(quick):
    records = records_of(read_rows(quick / "digits.json"))
    rows = [row for seed, record in records.items() for row in rows_of(int(seed), record)]
    assert records_of(rows) == records


def test_what_is_there_is_not_run_again(quick):
    before = (quick / "digits.json").read_bytes()
    done = run("run", "--quick", "--suites", "digits", "--seeds", "0", "10", "--out", str(quick))
    assert (done.returncode, done.stdout) == (0, "")
    assert (quick / "digits.json").read_bytes() == before


def test_results_of_other_settings_are_not_continued(quick, tmp_path):
    rows = read_rows(quick / "digits.json")
    rows[0]["notes"]["alphas"] = [1.0]
    write_rows(tmp_path / "digits.json", rows)
    done = run("run", "--quick", "--suites", "digits", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 1 and "--restart" in done.stderr


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_the_same_again(suite):
    """The seed draws everything; training moves the weights, and each task has a score."""

    def family():
        torch.manual_seed(3)
        made = import_module(f"benchmarks.quality.suite_{suite}").build(3, True)
        base, experts = train_family(made)
        return made, base, experts

    (suite, base, experts), (_, base_again, experts_again) = family(), family()
    for first, second in zip([base, *experts], [base_again, *experts_again], strict=True):
        assert first.keys() == base.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert len(experts) == len(suite.task_batches) <= len(suite.test)
    assert all(any(not torch.equal(expert[name], base[name]) for name in base) for expert in experts)
    model = suite.model()
    model.load_state_dict(base)
    assert len(score(suite, model, suite.test).accuracy) == len(suite.test) == len(suite.validation)


def test_low_rank_training_changes_linear_layers_by_a_low_rank():
    suite = suite_lora.build(0, True)
    model = suite.model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    suite_lora.train_low_rank(model, suite.task_batches["records"], 3, 1e-2)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            update = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
            assert 1 <= torch.linalg.matrix_rank(update, rtol=1e-4) <= suite_lora.RANK
    for name in ("embedding.weight", "norm.weight", "head.bias"):
        assert torch.equal(after[name], before[name])


def test_preference_training_raises_the_preference():
    torch.manual_seed(0)
    suite = suite_dpo.build(0, True)
    model = suite.model()
    before = {task: suite_dpo.margins(model, suite.validation[task]).mean().item() for task in suite.task_batches}
    suite_dpo.train_preferences(model, suite.task_batches["refusing"], 10, 3e-3)
    after = {task: suite_dpo.margins(model, suite.validation[task]).mean().item() for task in suite.task_batches}
    assert after["refusing"] > before["refusing"] + 1


def test_margins_are_differences_of_log_probabilities():
    """Of the answers alone: the prompt has no part in them, nor what follows the end."""
    torch.manual_seed(0)
    model = Transformer(128, suite_dpo.LENGTH, 8, 1, causal=True).double()
    preferred, other = ("ask ", "yes\n"), ("ask ", "oh no\n")
    inputs, targets = suite_dpo.encode([preferred, other], answers_only=True)

    def log_probability(prompt, answer):
        text = torch.tensor(list((prompt + answer).encode()))
        found = model(text[None, :-1])[0].log_softmax(1)
        return sum(found[place - 1, text[place]] for place in range(len(prompt), len(text)))

    expected = log_probability(*preferred) - log_probability(*other)
    torch.testing.assert_close(suite_dpo.margins(model, (inputs[None], targets[None]))[0], expected)


def test_questions_of_two_splits_differ():
    draw = random.Random(0)
    asked = {split: {suite_dpo.question(draw, kind, split)[0] for kind in ("sum", "mail", "mood") for _ in range(300)}
             for split in ("training", "validation", "test")}  # fmt: skip
    assert asked["training"].isdisjoint(asked["validation"]) and asked["test"].isdisjoint(asked["validation"])
    assert asked["training"].isdisjoint(asked["test"])


def made_up(points, rivals=(50.0, 50.0)):
    """Records of all seeds and suites: candidate i is at `points[i]`, `tsvm` at `rivals`, and seeds differ a little.

    The defaults, which are no candidate, are at 45.
    """

    def entry(default, tuned=0.0):
        return {name: {"accuracy": [value], "validation": [value], "bits": [1.0]} for name, value in
                (("default", default), ("tuned", tuned))}  # fmt: skip

    return {
        suite: {
            str(seed): {
                "base": {"accuracy": [10.0], "bits": [4.0]},
                "experts": [{"accuracy": [90.0], "bits": [0.5]}],
                "methods": {method: entry(40.0 + place, 41.0 + place) for place, (method, _, _) in enumerate(TABLE)}
                | {"tsvm": entry(*rivals)},
                "rtsvm": {label(rtsvm_defaults()): entry(45.0 + 0.1 * (seed % 2))}
                | {label(each): entry(value + 0.1 * (seed % 2))
                   for each, value in zip(candidates(), points, strict=True)},
            }
            for seed in (*CHOICE_SEEDS, *HELD_OUT_SEEDS) if suite in CHOICE_SUITES or seed in HELD_OUT_SEEDS
        }
        for suite in SUITES
    }  # fmt: skip


def test_the_rule():
    points = [52.0] + [40.0] * (len(candidates()) - 1)
    records = made_up(points)
    assert chosen(records) == candidates()[0]
    best = label(candidates()[0])

    def met(records):
        return [good for _, good in conditions(comparable(records), best)]

    assert met(records) == [True, True, True]
    assert met(made_up([51.0, *points[1:]])) == [False, True, True]  # too little
    assert met(made_up(points, (50.0, 53.0))) == [True, True, False]  # `tsvm` is better if tuned
    for seed in HELD_OUT_SEEDS:
        records["vision"][str(seed)]["rtsvm"][best]["default"]["accuracy"] = [49.0 + 0.1 * (seed % 2)]
    assert met(records)[1] is False  # worse in one suite
    del records["dpo"]["0"]
    assert chosen(records) is None  # the choice waits for all results


def test_the_tables_say_what_the_rule_decides():
    points = [50.5] * (len(candidates()) - 2) + [52.0, 50.5]  # the last one is the preset
    best = label(candidates()[-2])
    page = text(made_up(points))
    assert f"Best of 24 candidates by validation accuracy at alpha 1: **{best}**." in page
    assert page.count("**met**") == 3 and "The rule makes it the default." in page
    assert f"| {best} | +2.0 | +2.0 | +2.0 | +2.0 | +2.0 | +2.0 | +2.03 |" in page
    assert f"Points of `rtsvm`, {best}:" in page and "| mean of the suites | +2.04 ± 0.02 |" in page
    for suite in SUITES:
        assert f"### {suite.capitalize()} (held-out seeds, test data)" in page
    page = text(made_up([50.5] * len(candidates())))
    assert "**missed**" in page and "The rule offers it as a preset; the defaults stay." in page


def test_held_out_suites_take_no_part_in_the_choice():
    records = load()
    assert set(SUITES) - set(CHOICE_SUITES) == {"vision", "sequences"}
    assert not any(str(seed) in records[suite] for suite in ("vision", "sequences") for seed in CHOICE_SEEDS)
    assert all(each in variants(suite) for suite in CHOICE_SUITES for each in candidates())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "iso_cts", "tsvm", "rtsvm"])
def test_every_method_is_linear_in_alpha(method):
    """The study makes each merge once, at alpha 1."""
    base = {"matrix": torch.randn(12, 9), "vector": torch.randn(9)}
    experts = [{name: weight + torch.randn_like(weight) for name, weight in base.items()} for _ in range(3)]
    once = merge_state_dicts(base, experts, MergeConfig(method)).state_dict
    exact = merge_state_dicts(base, experts, MergeConfig(method, alpha=0.35)).state_dict
    for name, weight in at_alpha(base, once, 0.35).items():
        torch.testing.assert_close(weight, exact[name], atol=1e-5, rtol=1e-5)


def test_the_tables_are_those_of_the_results():
    done = run("table", "--check")
    assert done.returncode == 0, done.stderr


def test_methods_that_came_later(tmp_path):
    """The table is that of the results; `wudi` is a minimum; equal tasks are merged as one."""
    assert further.text(read_rows(further.FILE)) in further.README.read_text()
    tasks = [torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t)) for t in range(2)]

    def objective(merged):
        return sum(((merged - task) @ task.mT).square().sum() / task.square().sum() for task in tasks)

    merged = further.wudi(tasks).requires_grad_()
    assert torch.autograd.grad(objective(merged), merged)[0].abs().max() < 1e-12
    torch.testing.assert_close(further.wudi(tasks[:1] * 3), tasks[0])
    assert further.ace(tasks).shape == (6, 5)
