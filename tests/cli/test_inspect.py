import json
import subprocess
import sys

import pytest
import torch
from checkpoints import digest, family, save

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.sizes import parse_size


@pytest.fixture
def inspect(tmp_path, capsys, monkeypatch):
    """Run `rtsvm inspect` on a small family; return exit code, stdout, stderr."""
    monkeypatch.setattr("r_tsvm_kernels.engine.calibrate.SAMPLE_SIDE", 64)
    (base, *tuned), _, _ = family(tmp_path / "in", dtype=torch.bfloat16, shards=(1, 1, 2))

    def run(*arguments):
        models = [item for path in tuned for item in ("--model", str(path))]
        code = main(["inspect", "--base", str(base), *models, *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_plan_is_shown_and_nothing_is_written(inspect, tmp_path):
    inspect()
    before = digest(tmp_path)
    code, out, _ = inspect("--estimate-time")
    assert code == 0
    for words in ("model.embed_tokens ", " mean ", "not a matrix", " base ", "int64 buffer", "10 tensors",
                  "from 4 files", "--memory can be as low as", "computing"):  # fmt: skip
        assert words in out
    assert digest(tmp_path) == before


# The form of the JSON, which other programs read: keys and types.
TENSOR = {
    "treatment": str, "reason": str, "parameters": dict, "shape": list, "dtype": str,
    "rank_limit": (int, type(None)), "bytes_read": int, "bytes_written": int, "flops": float,
    "tile_rows": int, "tile_input_bytes": int, "tile_work_bytes": int, "matrices": int, "matrix_shape": list,
}  # fmt: skip
PLAN = {
    "method": str, "base": str, "models": list, "bytes_read": int, "bytes_written": int, "flops": float,
    "input_files": list, "shards": dict, "dropped": dict, "dequantised": dict, "notes": list, "schedule": dict,
    "vocabulary": (dict, type(None)),
    "seconds": (dict, type(None)),
    "groups": list, "tensors": dict, "kinds": dict, "kernels": dict, "parameters": dict, "model_parameters": list,
}  # fmt: skip
SCHEDULE = {
    "device": str, "workers": int, "read_bytes": int, "work_bytes": int, "peak_host_bytes": int,
    "peak_device_bytes": int, "smallest_host_bytes": int, "smallest_device_bytes": int,
}  # fmt: skip
FILE = {"path": str, "bytes_read": int, "passes": int}
SECONDS = dict.fromkeys(("reading", "computing", "writing", "total"), float)


def check_form(data, form):
    assert data.keys() == form.keys()
    for key, kind in form.items():
        assert isinstance(data[key], kind), key


@pytest.mark.parametrize("method", ["tsvm", "rtsvm", "linear", "task_arithmetic"])
def test_json(inspect, method):
    plan = json.loads(inspect("--json", "--method", method, "--estimate-time")[1])
    check_form(plan, PLAN)
    check_form(plan["schedule"], SCHEDULE)
    check_form(plan["seconds"], SECONDS)
    for file in plan["input_files"]:
        check_form(file, FILE)
    for tensor in plan["tensors"].values():
        check_form(tensor, TENSOR)
    assert sorted(name for group in plan["groups"] for name in group) == sorted(plan["tensors"])
    assert sum(file["bytes_read"] for file in plan["input_files"]) == plan["bytes_read"]
    assert sum(tensor["bytes_written"] for tensor in plan["tensors"].values()) == plan["bytes_written"]
    assert plan["tensors"]["model.layers.0.mlp.weight"]["rank_limit"] == (8 if "tsvm" in method else None)
    assert plan["seconds"]["total"] > 0


def test_shared_ranks_have_a_limit_of_their_own(inspect):
    plan = json.loads(inspect("--json", "--method", "rtsvm", "--set", "rank=shared")[1])
    assert plan["tensors"]["model.layers.0.mlp.weight"]["rank_limit"] == 15  # of 16, one is the other model's


def test_time_is_measured_only_when_asked(inspect, monkeypatch):
    monkeypatch.setattr("r_tsvm_kernels.engine.calibrate.estimate_time", None)
    assert json.loads(inspect("--json")[1])["seconds"] is None


def test_a_budget_is_kept_or_refused_with_the_smallest(inspect):
    plan = json.loads(inspect("--json", "--threads", "8")[1])
    smallest, peak = (plan["schedule"][key] for key in ("smallest_host_bytes", "peak_host_bytes"))
    within = json.loads(inspect("--json", "--threads", "8", "--memory", str(smallest))[1])["schedule"]
    assert within["peak_host_bytes"] == smallest < peak
    code, _, err = inspect("--memory", str(smallest - 1))
    assert code == 2 and f"{smallest} bytes" in err
    named = err.split("at least ")[1].split(" ")[0]
    assert parse_size(named) >= smallest and inspect("--memory", named)[0] == 0


@pytest.mark.parametrize("flag", ["--memory", "--device-memory"])
def test_not_a_size(inspect, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect(flag, "much")
    assert stop.value.code == 2 and f"argument {flag}: expected a size such as 5GB" in capsys.readouterr().err


MERGE = """
import re, sys
from pathlib import Path
from r_tsvm_kernels.cli import main
code = main(["merge", *sys.argv[1:]])
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(code, peak)
"""


@pytest.mark.parametrize("method, shape", [("linear", (3000, 2048)), ("tsvm", (512, 768))])
@pytest.mark.parametrize(
    "smallest",
    [pytest.param(False, id="two workers", marks=pytest.mark.exhaustive), pytest.param(True, id="smallest budget")],
)
def test_a_merge_stays_within_the_announced_memory(tmp_path, capsys, method, shape, smallest):
    tensors = {f"w{i}": torch.randn(shape).bfloat16() for i in range(4)}
    models = [save(tmp_path / str(i), {name: t + 0.1 * i * i * t for name, t in tensors.items()}) for i in range(3)]
    merge = ["--base", *models[:1], "--model", models[1], "--model", models[2], "--method", method, "--threads", "2"]
    merge = list(map(str, merge))

    def announced():
        assert main(["inspect", *merge, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["schedule"]

    if smallest:
        merge += ["--memory", str(announced()["smallest_host_bytes"])]
    limit = announced()["peak_host_bytes"]
    command = [sys.executable, "-c", MERGE, *merge, "--quiet", str(tmp_path / "out")]
    code, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:])
    assert code == 0 and limit / 3 < peak < limit
