"""Merges keep to the kernels that they began with, and know which ops they call."""

import json

import pytest
import simulated_device
from checkpoints import digest, family
from merging import group, tasks_of

from r_tsvm_kernels import (
    MergeConfig,
    ResumeRefusedError,
    dispatch,
    merge_checkpoints,
    merge_tensors,
    use_backend,
    verdicts,
)
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import job, local, tiles
from r_tsvm_kernels.engine.journal import read_journal
from r_tsvm_kernels.methods import METHODS, TensorJob
from r_tsvm_kernels.verdicts import Verdict, children, store

OP = "elect_and_sum"


def found_to_be(monkeypatch, **times):
    """Let the checks of the op's kernels give these times; None for a kernel that fails."""

    def run_checks(device, kernels, deadline=None, progress=None):
        own = {name: Verdict(True, seconds=s) if s else Verdict(False, "it broke") for name, s in times.items()}
        return {OP: own | {"torch": Verdict(True, seconds=9.0)}}

    monkeypatch.setattr(children, "run_checks", run_checks)


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """A function that merges with kernels that say what they do; it takes the number of tensors to stop after."""
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    ran = []

    def noted(name):
        def change(run, *args):
            ran.append(name)
            return run(*args)

        return change

    simulated_device.install(monkeypatch, OP, cuda=noted("cuda"), triton=noted("triton"))
    paths, _, _ = family(tmp_path / "in")
    base, *tuned = map(str, paths)
    config = MergeConfig("task_arithmetic", base_model=base, models=tuple({"model": m} for m in tuned))

    def run(out, stop_after=None, **options):
        ran.clear()
        with pytest.MonkeyPatch.context() as patch:
            left = iter(range(stop_after if stop_after is not None else 10**6))

            def merge_tile(*arguments):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return tiles.merge_tile(*arguments)

            patch.setattr(local, "merge_tile", merge_tile)
            merge_checkpoints(config, tmp_path / out, device="cpu", threads=1, **options)
        return {name: code for name, code in digest(tmp_path / out).items() if name.endswith("safetensors")}, set(ran)

    return run


def stopped(merge, out="out"):
    with pytest.raises(KeyboardInterrupt, match="run again with --resume"):
        merge(out, stop_after=3)


def check_again(monkeypatch, **times):
    found_to_be(monkeypatch, **times)
    verdicts.check("cpu", {OP: ["cuda", "triton"]})
    verdicts.forget()


def test_the_kernels_of_a_merge_are_journaled(merge, monkeypatch, tmp_path):
    found_to_be(monkeypatch, cuda=1.0, triton=2.0)
    assert merge("out")[1] == {"cuda"}
    expected = {"add_update": "torch", OP: "cuda"}  # the ops of the method, no others
    assert read_journal(tmp_path / "out" / "merge_journal.jsonl")[0]["kernels"] == expected
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["kernels"] == expected


def test_resuming_keeps_to_the_kernels(merge, monkeypatch, tmp_path):
    found_to_be(monkeypatch, cuda=1.0, triton=2.0)
    stopped(merge)
    check_again(monkeypatch, cuda=2.0, triton=1.0)
    weights, ran = merge("out", resume=True)
    assert ran == {"cuda"} and dispatch.chosen(OP, "cpu") == "triton"
    assert weights == merge("whole")[0]


def test_resuming_is_refused_where_a_kernel_fails_now(merge, monkeypatch):
    found_to_be(monkeypatch, cuda=1.0, triton=2.0)
    stopped(merge)
    check_again(monkeypatch, cuda=None, triton=1.0)
    message = f"{OP} ran on the backend cuda before, which cannot run now: its self-check failed: it broke; .*--restart"
    with pytest.raises(ResumeRefusedError, match=message):
        merge("out", resume=True)
    monkeypatch.setenv("RTSVM_SELFCHECK", "off")
    with pytest.raises(ResumeRefusedError, match="RTSVM_SELFCHECK=off leaves out kernels"):
        merge("out", resume=True)
    with (
        pytest.raises(ResumeRefusedError, match=f"kernels: {OP} was cuda, is triton"),
        use_backend(elect_and_sum="triton"),
    ):
        merge("out", resume=True)
    monkeypatch.setenv("RTSVM_SELFCHECK", "on")
    assert merge("out", restart=True)[1] == {"triton"}


def test_settled_backends(monkeypatch):
    with dispatch.settled({"task_gram": "torch", "task_spread": None}, "cpu"):
        assert dispatch.chosen("task_gram", "cpu") == "torch" and dispatch.chosen("task_spread", "cpu") == "cpu"
        with use_backend(task_gram="cpu"):
            assert dispatch.chosen("task_gram", "cpu") == "cpu"
        with dispatch.settled({"task_spread": "torch"}, "cpu"):
            assert {dispatch.chosen(op, "cpu") for op in ("task_gram", "task_spread")} == {"torch"}
    assert dispatch.chosen("task_gram", "cpu") == "cpu"
    assert dispatch.unusable("task_gram", "abacus", "cpu") == "the op has no such kernel"


OPTIONS = {
    "rtsvm": [{}, {"preset": "weighted"}, {"density": 0.4}, {"solver": "products"}, {"pruning": "threshold"}],
    "tsvm": [{}, {"solver": "products"}],
    **{name: [{"density": 0.4, "rescale": True}, {}] for name in ("ties", "breadcrumbs", "dare_ties", "della")},
    "sce": [{}, {"select_topk": 0.5}],
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_names_the_ops_that_it_calls(name, monkeypatch):
    """All of them are checked together before a merge, and journaled."""
    asked = set()
    choose = dispatch.chosen

    def noted(op, *rest, **options):
        asked.add(op)
        return choose(op, *rest, **options)

    monkeypatch.setattr(dispatch, "chosen", noted)
    for options in OPTIONS.get(name, [{}]):
        config = MergeConfig(name, **options)
        for shape in ((24, 17), (7,)):
            merge_tensors(*group(shape, tasks_of(name, 3)), config, name="w")
            parameters = config.options(tasks_of(name, 3), "w")
            if len(shape) == 2 or not METHODS[name].matrices_only:
                METHODS[name].cost(TensorJob(shape, tasks_of(name, 3), 4), parameters)
    assert asked <= set(METHODS[name].ops) and bool(asked) == bool(METHODS[name].ops)


# --- rtsvm selfcheck


def test_the_command(checks, monkeypatch, capsys):
    monkeypatch.setattr("r_tsvm_kernels.selfcheck.check.REALISTIC", {"cpu": (32, 24)})
    arguments = ["selfcheck", "--device", "cpu", "--op", "task_spread", "--op", "split_planes"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert store.circumstances("cpu")["sources"] in out
    (line,) = [line for line in out.splitlines() if line.startswith("task_spread")]
    assert line.split()[1:3] == ["cpu", "passed"] and "split_planes" not in out  # which has no kernel there
    assert all(len(line) <= 100 for line in out.splitlines())
    monkeypatch.setattr(children, "run_checks", lambda *_, **__: {"task_spread": {"cpu": Verdict(False, "it broke")}})
    assert main(arguments) == 1
    assert "FAILED: task_spread, cpu: it broke" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["circumstances"] == store.circumstances("cpu")
    assert report["verdicts"]["task_spread"]["cpu"]["reason"] == "it broke"
    verdicts.forget()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "Self-checks on cpu: 0 kernels passed, 1 failed, " in out and "failed: task_spread, cpu: it broke" in out
    assert main(["selfcheck", "--op", "task_sprade"]) == 2
    assert "no op 'task_sprade'" in capsys.readouterr().err


def test_the_command_where_nothing_can_be_checked(monkeypatch, capsys):
    monkeypatch.setattr(children, "run_checks", lambda *_, **__: {})
    assert main(["selfcheck", "--device", "cpu", "--op", "task_spread"]) == 0
    assert "not checked: no memory, or no process could start" in capsys.readouterr().out
