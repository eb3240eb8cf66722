"""Other libraries as providers of `rtsvm bench`: found without an import, checked, timed; here by pretended ones."""

import sys

import pytest
import torch
from bench_rows import outcomes

from r_tsvm_kernels import MergeConfig, bench, merge_tensors
from r_tsvm_kernels.bench import PLANS, REGISTRY, Inputs, Results, Stopwatch, peers
from r_tsvm_kernels.bench.measure import worst_error
from r_tsvm_kernels.bench.table import LEGEND, legend
from r_tsvm_kernels.cli import main

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "matmul": 1e11}
DRY_RUN = bench.PLANS["dry-run"]
LABEL = "mergekit 9.9"
RIGHT = """
import torch

def merge_tensors(tensors, method, *, parameters, base_index):
    print("noise on stdout")
    assert (method, parameters, base_index) == ("linear", {"weight": 1.0}, None)
    return torch.stack(tensors).float().mean(0).to(tensors[0].dtype)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a fake mergekit 9.9, and remove it at the end, imported or not."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
        monkeypatch.delitem(sys.modules, name)

    def install(source):
        (tmp_path / "mergekit").mkdir()
        (tmp_path / "mergekit" / "__init__.py").touch()
        (tmp_path / "mergekit" / "merge_methods.py").write_text(source)
        (tmp_path / "mergekit-9.9.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: mergekit\nVersion: 9.9\n"
        (tmp_path / "mergekit-9.9.dist-info" / "METADATA").write_text(metadata)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
        del sys.modules[name]


@pytest.fixture
def no_others(monkeypatch):
    """Hide the other libraries, if they are installed here."""
    monkeypatch.setattr(peers, "PEERS", {"mergekit": peers.PEERS["mergekit"]})


def inputs(shape=(24, 16), dtype="bfloat16"):
    return Inputs("tiny", shape, dtype, 3, CPU)


def rows_of(name):
    case = peers.with_peers(name, REGISTRY[name].make(inputs()))
    return outcomes(bench.run_case(name, case, Stopwatch(CPU), CEILINGS, DRY_RUN))


def imported():
    return any(name.partition(".")[0] == "mergekit" for name in sys.modules)


def command(capsys, *arguments):
    code = main(["bench", "--device", "cpu", "--dry-run", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.usefixtures("no_others")
def test_a_peer_is_found_checked_and_timed(fake, capsys, tmp_path):
    fake(RIGHT)
    assert peers.installed("mergekit") == "9.9" and not imported()
    file = tmp_path / "a.json"
    code, out, err = command(capsys, "--only", "linear", "--json", file)
    assert code == 0 and ": wrong" not in err and "noise" not in out + err
    assert LABEL.partition(" ")[0] in out and "through its own function" in out and "over peer" in out
    rows = bench.read_rows(file)
    assert rows[0]["versions"]["mergekit"] == "9.9"
    found = outcomes(rows)
    peer = found[LABEL]
    assert peer.role == "peer" and peer.status == "timed"
    assert peer.metrics["error"]["notes"]["compared"] == "all elements"
    assert 0 < peer.error <= peer.limit and peer.metrics["time"]["rounds"] >= 3
    assert peer.metrics["speed-up"]["median"] > 0
    against = {row["notes"]["against"] for row in rows if (row["provider"], row["metric"]) == ("cpu", "speed-up")}
    assert against == {"reference", LABEL}
    changes, _ = bench.compare([(rows, rows)])
    assert LABEL in {change.row["provider"] for change in changes}


@pytest.mark.usefixtures("no_others")
@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        (RIGHT.replace("mean(0)", "mean(0).mul(1.01)"), "wrong", "error"),
        (RIGHT.replace(".to(tensors[0].dtype)", "[0]"), "wrong", "error"),
        ("def merge_tensors(*tensors, **options): raise KeyError('no such method')", "failed", "no such method"),
        ("", "failed", "does not load: ImportError"),
        ("raise OSError('library lost')", "failed", "library lost"),
    ],
    ids=["off", "another shape", "raises", "not as expected", "does not load"],
)
def test_a_peer_that_is_wrong_or_fails(fake, capsys, source, status, reason):
    fake(source)
    row = rows_of("linear")[LABEL]
    assert row.status == status and reason in row.reason and not row.timed
    code, out, err = command(capsys, "--only", "linear")
    assert code == 0  # it is not ours
    assert f"{LABEL} {status.upper()}" in " ".join(out.split()) and f"by {LABEL}: {status}" in err


@pytest.mark.usefixtures("no_others")
def test_nothing_is_imported_for_benchmarks_without_peers(fake):
    fake("raise AssertionError")
    rows = bench.run_suite(bench.chosen(["task_statistics", "star"]), PLANS["dry-run"], CPU, Results())
    assert not imported() and peers.taking_part(bench.chosen(["task_statistics", "star"])) == []
    assert {row["role"] for row in rows} <= {"ours", "reference", "torch", "ceiling"}


def test_without_peers_nothing_changes(monkeypatch, capsys):
    looked_for = []
    monkeypatch.setattr(peers, "find_spec", looked_for.append)  # finds nothing
    before = {name for name in sys.modules if name.partition(".")[0] in ("mergekit", "fusion_bench", "peft")}
    code, out, _ = command(capsys, "--only", "ties")
    assert code == 0 and "peer" not in out
    assert set(looked_for) == {"mergekit", "fusion_bench", "peft"}
    assert before == {name for name in sys.modules if name.partition(".")[0] in ("mergekit", "fusion_bench", "peft")}
    text = legend([], 200)
    assert len(text.splitlines()) == len(LEGEND) - 3 and "peer" not in text  # nor the best of torch


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "rtsvm_some_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.installed("rtsvm_some_folder") is None and peers.installed("rtsvm_nothing") is None
    (tmp_path / "rtsvm_some_folder" / "__init__.py").touch()
    assert peers.installed("rtsvm_some_folder") is None  # nobody installed it


def test_every_peer_belongs_to_a_benchmark():
    assert all(name in REGISTRY for makers in peers.PEERS.values() for name in makers)


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if entry.group == "merges"])
def test_every_merge_changes_the_weight(name):
    assert all(float(tensor.norm()) > 0 for tensor in REGISTRY[name].make(inputs()).truth())


# --- what is a right result ----------------------------------------------------------------------------------------


def ties_by_topk(given, density):
    """TIES that keeps any of the elements that are tied."""
    deltas = []
    for delta in given.deltas:
        kept = delta.abs().flatten().flip(0).topk(int(density * delta.numel())).indices
        mask = torch.zeros(delta.numel()).index_fill_(0, kept, 1).flip(0)
        deltas.append(delta * mask.view_as(delta))
    stacked = torch.stack(deltas).double()
    agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_elements_that_are_tied_are_left_out():
    given = inputs((96, 130))
    case = REGISTRY["ties"].make(given)
    counts = peers.thresholds("ties", given.numel)
    judge = peers.apart_from_ties(given.base, given.tuned, counts, torch.float32)
    truth, found = case.truth(), ties_by_topk(given, 0.2)
    assert worst_error([found], truth) > 0.01  # bfloat16 weights are on a coarse grid
    assert judge([found], truth) < 1e-6
    assert judge([ties_by_topk(given, 0.22)], truth) > 0.1
    changed = found.clone()
    changed.view(-1)[int(found.abs().argmax())] *= 1.1
    assert judge([changed], truth) > 1e-4
    assert judge([found.flatten()], truth) == float("inf")


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_other_masks_have_the_same_statistics(name):
    given = inputs((256, 320))
    truth, judge = REGISTRY[name].make(given).truth(), peers.by_statistics(given)

    def error(**parameters):
        config = MergeConfig(name, seed=7, **parameters)
        return judge([merge_tensors(given.base.double(), list(given.exact[1]), config).weight - given.exact[0]], truth)

    limit = peers.draws_limit(given)
    assert 0 < error(density=0.5) < limit
    assert error(density=0.4) > limit
    assert error(density=0.5, rescale=False) > limit
    assert judge([truth[0].flip(0)], truth) > limit  # of the same norm
    assert judge([torch.full_like(truth[0], torch.nan)], truth) == float("inf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_to_the_dtype_is_no_error(dtype):
    given = inputs((96, 130), dtype)
    case = REGISTRY["task_arithmetic"].make(given)
    truth = case.truth()
    limit = peers.rounding_limit(case.limit, given.base)(truth)
    weight = given.exact[0] + truth[0]
    assert worst_error(case.values(weight.to(given.base.dtype)), truth) < limit
    assert worst_error(case.values((weight + 0.15 * truth[0]).to(given.base.dtype)), truth) > limit
