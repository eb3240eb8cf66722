"""Libraries that are installed, as peers of `rtsvm bench`; `make test-integrations` runs this beside each of them."""

import pytest
import torch
from bench_rows import outcomes

from r_tsvm_kernels import bench
from r_tsvm_kernels.bench import REGISTRY, Inputs, Stopwatch, merges, peers
from r_tsvm_kernels.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own
CPU = torch.device("cpu")
PAIRS = [(package, name) for package, makers in peers.PEERS.items() for name in makers]
DENSE = {"dare_linear": 0.3, "dare_ties": 0.3, "ties": 0.25, "breadcrumbs": 0.8, "breadcrumbs_ties": 0.8, "sce": 0.6}


def row_of(package, name, dtype, shape=(96, 130)):
    version = peers.installed(package)
    if version is None:
        pytest.skip(f"{package} is not installed: run make test-integrations")
    case = peers.with_peers(name, REGISTRY[name].make(Inputs("some", shape, dtype, 3, CPU)))
    rows = bench.run_case(name, case, Stopwatch(CPU), {"copy": 1e10, "matmul": 1e11}, bench.PLANS["dry-run"])
    return outcomes(rows)[f"{package} {version}"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("package", "name"), PAIRS)
def test_a_peer_agrees(package, name, dtype):
    row = row_of(package, name, dtype)
    expected = "wrong" if (package, name, dtype) == ("mergekit", "sce", "float16") else "timed"
    assert row.status == expected, row


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("package", "name"), [pair for pair in PAIRS if pair[1] in DENSE])
def test_another_density_is_wrong(package, name, dtype, monkeypatch):
    entry, (method, parameters) = REGISTRY[name], merges.ELEMENT_WISE[name]
    key = "select_topk" if name == "sce" else "density"

    def make(inputs):
        case = entry.make(inputs)
        monkeypatch.setitem(merges.ELEMENT_WISE, name, (method, parameters | {key: DENSE[name]}))  # of the peer alone
        return case

    monkeypatch.setitem(REGISTRY, name, bench.Benchmark(name, entry.kind, entry.group, make))
    assert row_of(package, name, dtype).status == "wrong"


def test_the_command_names_them(capsys):
    found = [package for package in peers.PEERS if peers.installed(package)]
    if not found:
        pytest.skip("no peer is installed: run make test-integrations")
    assert main(["bench", "--device", "cpu", "--dry-run", "--only", "ties"]) == 0
    out, err = capsys.readouterr()
    assert any(package in out for package in found) and "through its own function" in out
    assert ": wrong" not in err and ": failed" not in err
