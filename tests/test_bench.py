"""`rtsvm bench`: every op has a row, wrong results are found and not timed, results are kept and compared."""

import inspect
import sys
import time
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from bench_rows import outcomes
from compare import relative_error

from r_tsvm_kernels import bench, dispatch, linalg
from r_tsvm_kernels.bench import PLANS, REGISTRY, Inputs, Provider, Results, Stopwatch, published, results
from r_tsvm_kernels.bench.measure import LONGEST, plan_rounds
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "matmul": 1e11}
DRY_RUN = bench.PLANS["dry-run"]
SOME = ("task_statistics", "reweight_prune", "linear", "tsvm")


def tiny(shape=(24, 16), dtype="bfloat16"):
    return Inputs("tiny", shape, dtype, 3, CPU)


def run_case(name, case, plan=DRY_RUN):
    return outcomes(bench.run_case(name, case, Stopwatch(CPU), CEILINGS, plan))


def command(capsys, *arguments):
    code = main(["bench", "--device", "cpu", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def only(names=SOME):
    return [word for name in names for word in ("--only", name)]


@pytest.fixture(scope="module")
def report():
    return bench.run_suite(bench.chosen(SOME), PLANS["dry-run"], CPU, Results())


def test_everything_public_has_a_benchmark():
    names = {name.partition(":")[0] for name in REGISTRY}
    ops = set(dispatch.ops())
    spectral = {"leading_subspaces", "truncated_svd", "polar", "tsv_merge", "tsv_merge_layers"}
    assert all(inspect.isfunction(getattr(linalg, name)) for name in spectral)
    assert names == ops | spectral | set(METHODS) | {"combine_adapters"}


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.name)
def test_every_plan_names_real_matrices(plan):
    for kind in plan.matrices:
        found = list(bench.suite.inputs_of(plan, kind, CPU))
        assert len({(inputs.matrix, inputs.dtype) for inputs in found}) == len(found) > 0
        assert all(len(inputs.shape) == 2 for inputs in found)


@pytest.mark.parametrize(
    ("model", "vocabulary", "billions"),
    [("Mistral-7B", 32000, 7.24), ("Llama-3-8B", 128256, 8.03), ("Qwen2.5-7B", 152064, 7.62)],
)
def test_the_matrices_are_all_of_the_model(model, vocabulary, billions):
    described = bench.MODELS[model]
    in_block = sum(rows * columns for rows, columns in described.matrices.values())
    total = described.blocks * in_block + 2 * vocabulary * described.matrices["q_proj"][1]
    assert total / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_task_vectors_are_exact(dtype):
    inputs = tiny((64, 64), dtype)
    base, tuned = inputs.exact
    for delta, exact in zip(inputs.deltas, tuned, strict=True):
        assert torch.equal(delta.double(), exact - base)
        assert delta.count_nonzero() > 0.9 * delta.numel()


@pytest.mark.parametrize("name", ["magnitude_select", "reweight_prune", "magnitude_ranks"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_best_of_torch_is_right(name, dtype):
    rows = run_case(name, REGISTRY[name].make(tiny((96, 130), dtype)))
    assert {row.status for row in rows.values()} <= {"timed", "unavailable"}
    assert rows["torch, best"].error <= 1e-6


def test_a_wrong_provider_is_named_and_not_timed():
    case = REGISTRY["reweight_prune"].make(tiny())
    calls = []

    def almost():
        calls.append(1)
        pruned = case.providers[-1].run()
        flat = pruned[0].view(-1)
        flat[int(flat.abs().argmax())] *= 1.001  # one element of one task, by a thousandth
        return pruned

    def fails():
        raise RuntimeError("no such kernel\nand more")

    def nothing():
        return [torch.full((24, 16), torch.nan)] * 3

    bad = [Provider("almost", almost), Provider("fails", fails), Provider("nan", nothing)]
    rows = run_case("reweight_prune", replace(case, providers=[*case.providers, *bad]))
    assert rows["almost"].status == "wrong" and 1e-6 < rows["almost"].error < 1e-2
    assert rows["fails"].status == "failed" and rows["fails"].reason == "RuntimeError: no such kernel"
    assert rows["nan"].status == "wrong" and rows["nan"].error == float("inf")
    assert not any(rows[name].timed for name in ("almost", "fails", "nan"))
    assert len(calls) == 2  # to be checked, not to be timed
    assert rows["reference"].status == "timed"


@pytest.mark.parametrize("name", ["linear", "polar"])  # of fine-tunes, and of task vectors
def test_a_provider_that_changes_its_inputs_is_refused(name):
    case = REGISTRY[name].make(tiny(dtype="float32"))
    run = case.providers[-1].run
    changed = (case.inputs.tuned if name == "linear" else case.inputs.deltas)[0]

    def subtracts():
        found = run()
        changed.float().sub_(case.inputs.base)  # float() copies other dtypes only
        return found

    rows = run_case(name, replace(case, providers=[*case.providers, Provider("subtracts", subtracts)]))
    assert rows["subtracts"].status == "failed" and "changes its inputs" in rows["subtracts"].reason
    assert not rows["subtracts"].timed and rows[case.providers[0].name].status == "timed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_benchmark_is_right_and_leaves_its_inputs_alone(dtype):
    inputs = tiny(dtype=dtype)
    given = [inputs.base, *inputs.tuned, *inputs.deltas]
    before = [tensor.clone() for tensor in given]
    for name, entry in REGISTRY.items():
        rows = run_case(name, entry.make(inputs))
        assert {row.status for row in rows.values()} <= {"timed", "unavailable"}, name
        # kernels outside torch, too, which torch's own count of changes does not see
        assert all(map(torch.equal, before, given)), name


def test_compiling_is_not_timed():
    case, calls = REGISTRY["linear"].make(tiny()), []

    def compiles_first():
        calls.append(time.sleep(0 if calls else 0.5))
        return case.providers[-1].run()

    compiling = replace(case, providers=[*case.providers, Provider("compiling", compiles_first, compiles=True)])
    assert "compiling" not in run_case("linear", compiling) and calls == []  # a short plan on a CPU does without
    row = run_case("linear", compiling, replace(DRY_RUN, compile=True))["compiling"]
    assert row.status == "timed" and row.metrics["time"]["median"] < 0.25 and len(calls) > 2


@pytest.mark.parametrize("name", ["add_update", "elect_and_sum: sum", "elect_and_sum: election"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_for_the_compiler_can_be_traced(name, dtype, monkeypatch):
    compile_ = torch.compile
    # Traced as always, then run without generating code, which would take half a minute.
    monkeypatch.setattr(torch, "compile", lambda call: compile_(call, backend="eager", fullgraph=True))
    case = REGISTRY[name].make(tiny(dtype=dtype))
    row = run_case(name, case, replace(DRY_RUN, compile=True))["torch.compile"]
    assert row.status == "timed" and row.error <= row.limit, row


def test_what_cannot_be_made_does_not_stop_the_others(monkeypatch):
    class Unknown(Exception):
        """Such as Triton raises: of no built-in kind."""

    def fails(inputs):
        raise Unknown("no inputs\nand more")

    def refused(inputs):
        case = REGISTRY["linear"].make(inputs)
        return replace(case, providers=[Provider("ours", lambda: fails(inputs)), *case.providers])

    entries = [replace(REGISTRY["linear"], make=make) for make in (fails, refused, REGISTRY["linear"].make)]
    rows = bench.run_suite(entries, PLANS["dry-run"], CPU, Results())
    failed = [row for row in rows if row["notes"].get("status") == "failed"]
    assert [(row["provider"], row["notes"]["reason"]) for row in failed] == [
        ("inputs", "Unknown: no inputs"), ("ours", "Unknown: no inputs")
    ]  # fmt: skip
    assert sum(row["metric"] == "time" and row["median"] is not None for row in rows) > 2


def test_a_group_is_chosen_by_its_name():
    assert {entry.group for entry in bench.chosen(["ops", "linalg"])} == {"ops", "linalg"}
    assert len(bench.chosen(["ops", "linalg", "merges"])) == len(REGISTRY)


def test_one_wrong_integer_is_seen():
    case = REGISTRY["random_mask"].make(tiny())

    def flipped():
        mask = case.providers[0].run().clone()
        mask[3, 5] ^= True
        return mask

    rows = run_case("random_mask", replace(case, providers=[Provider("flipped", flipped)]))
    assert rows["flipped"].status == "wrong"


def test_rows_say_all_there_is(report):
    assert all(row.keys() == set(results.FIELDS) for row in report)
    assert {row["name"] for row in report if row["role"] == "ceiling"} >= {"copy", "matmul"}
    assert {row["name"].partition(":")[0] for row in report if row["role"] != "ceiling"} == set(SOME)
    assert all(row["sources"] == bench.source_hash() for row in report)
    for name in SOME:
        found = outcomes(row for row in report if row["name"] == name)
        (reference,) = (row for row in found.values() if row.role == "reference")
        for row in found.values():
            if row.status == "unavailable":
                continue
            assert row.status == "timed" and row.error <= row.limit
            spread = row.metrics["time"]
            assert 0 < spread["q1"] <= spread["median"] <= spread["q3"] and spread["rounds"] >= 3
            # what is in one line comes from the same rounds
            assert spread["rounds"] == reference.metrics["time"]["rounds"]
            if row is not reference:
                assert row.metrics["speed-up"]["median"] > 0
                assert row.metrics["speed-up"]["rounds"] == spread["rounds"]
            if row.role == "ours":
                share = row.metrics["share"]
                assert share["median"] > 0 and share["notes"]["of"] in ("copy", "matmul")


def test_bytes_are_those_that_must_move():
    inputs = tiny((32, 16))
    numel = 32 * 16
    assert REGISTRY["task_statistics"].make(inputs).bytes == 2 * 4 * numel
    assert REGISTRY["reweight_prune"].make(inputs).bytes == (2 * 4 + 4 * 3) * numel
    assert REGISTRY["gemm3"].make(inputs).flops == 2 * 32 * 32 * 16


def test_what_is_published_agrees_with_the_oracle():
    matrices = [torch.randn(20, 14, dtype=torch.float64) for _ in range(3)]
    arrays = [matrix.numpy() for matrix in matrices]
    expected = oracle.tsv_merge(arrays, [4, 3, 2], [1.0, 0.5, 2.0])
    assert relative_error(published.tsv_merge(matrices, [4, 3, 2], [1.0, 0.5, 2.0]), expected) < 1e-12
    assert relative_error(published.polar(matrices[0]), oracle.polar(arrays[0])) < 1e-12


def test_exact_decompositions_are_made_once():
    published.exact_svd.cache_clear()
    matrix = torch.randn(20, 14, dtype=torch.float64)
    first, again = published.svd(matrix), published.svd(matrix.clone())
    assert all(x is y for x, y in zip(first, again, strict=True))
    other = matrix.flip(0)  # its sum is the same, or nearly
    U, s, Vh = published.svd(other)
    assert relative_error((U * s) @ Vh, other) < 1e-12
    assert published.svd(matrix.float())[0] is not published.svd(matrix.float())[0]  # what is timed is done each time
    assert published.exact_svd.cache_info().hits == 1


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_the_svd_of_gpus_is_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    U, s, Vh = published.svd_by_eigh(matrix)
    assert relative_error((U * s) @ Vh, matrix) < 1e-12
    assert relative_error(s, torch.linalg.svdvals(matrix)) < 1e-12
    assert relative_error(U.mT @ U, torch.eye(12)) < 1e-10


def test_a_gpu_sleeps_while_the_host_queues_what_is_timed(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"))
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.device = torch.device("cuda")
    assert stopwatch.seconds(lambda: happened.append("call")) == 0.005
    assert happened == ["wait", "sleep", "event", "call", "event", "wait"]


def test_interleaved_rounds():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = bench.interleaved(calls, 2)
    assert order == ["a", "b", "a", "b"] and {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"),
    [
        ({"a": 0.01, "b": 0.01}, 1.0, 15),
        ({"a": 0.01, "b": 5.0}, 1.0, 5),  # the slowest has as many as the others
        ({"a": 0.01, "b": 0.3}, 2.0, 12),
        ({"a": LONGEST / 3}, 1.0, 2),  # the least would take too long
        ({"a": 2 * LONGEST}, 1.0, 1),
    ],
)
def test_all_providers_get_the_same_rounds(seconds, budget, rounds):
    assert plan_rounds(seconds, budget, least=5) == (rounds, dict.fromkeys(seconds, 1))


def test_short_calls_are_repeated_in_a_sample():
    assert plan_rounds({"a": 1e-4, "b": 1.0}, 0.0, least=3) == (3, {"a": 20, "b": 1})


def test_the_command(tmp_path, capsys):
    file = tmp_path / "a.json"
    code, out, _ = command(capsys, "--dry-run", *only(), "--json", file)
    assert code == 0
    for text in (*SOME, "speed-up", "best torch", "the figures mean nothing"):
        assert text in out
    written = bench.read_rows(file)
    assert {row["name"] for row in written} >= set(SOME)
    before = file.read_bytes()
    code, _, err = command(capsys, "--dry-run", *only(), "--json", file)
    assert code == 2 and "not overwritten" in err and file.read_bytes() == before

    code, out, _ = command(capsys, "--dry-run", *only(["linear"]), "--compare", file)
    assert code == 0 and "after / before" in out and "2 times in both; of 1 of ours:" in out
    assert "both runs measured the same sources" in out


def test_a_narrow_terminal(report, capsys, monkeypatch):
    monkeypatch.setattr("r_tsvm_kernels.cli.bench.WIDTH", 80)
    code, out, _ = command(capsys, "--dry-run", *only())
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "speed-up" in out and "rounds" in out and "memory" not in out


def test_the_command_refuses(tmp_path, capsys, monkeypatch):
    code, _, err = command(capsys, "--only", "task_statistic")
    assert code == 2 and "did you mean 'task_statistics'" in err
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    for file in (other, tmp_path / "missing.json"):
        code, _, err = command(capsys, "--dry-run", "--compare", file)
        assert code == 2 and str(file) in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command(capsys, "--dry-run", "--plot", tmp_path / "plot.png")
    assert code == 2 and "r-tsvm-kernels[bench]" in err
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(("role", "expected"), [("ours", 1), ("torch", 0)])
def test_exit_code_of_a_wrong_result(capsys, monkeypatch, role, expected):
    entry = REGISTRY["linear"]

    def make(inputs):
        case = entry.make(inputs)
        return replace(case, providers=[*case.providers, Provider("off", lambda: inputs.base.float(), role)])

    monkeypatch.setitem(REGISTRY, "linear", replace(entry, make=make))
    code, out, err = command(capsys, "--dry-run", "--only", "linear")
    assert code == expected
    assert "off WRONG" in out and "by off: wrong: error" in err


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    from r_tsvm_kernels.bench.plot import plot

    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
