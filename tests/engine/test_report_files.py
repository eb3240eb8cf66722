"""Files that describe a merge: the report as JSON and as a page, and the model card."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import digest, family, without_times
from safetensors.torch import load_file

from r_tsvm_kernels import CheckpointError, MergeConfig, merge_checkpoints
from r_tsvm_kernels.checkpoint import hub
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import job, local, scheduling, smallest_schedule, tiles, write_page
from r_tsvm_kernels.plan import make_plan


def config_for(paths, method="rtsvm", **fields):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned), **fields)


def stop_after(count, monkeypatch):
    left = iter(range(count))

    def merge_tile(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return tiles.merge_tile(*arguments)

    monkeypatch.setattr(local, "merge_tile", merge_tile)


def test_the_report_is_complete(tmp_path):
    paths, base, tuned = family(tmp_path / "in", dtype=torch.bfloat16)
    result = merge_checkpoints(config_for(paths), tmp_path / "out")
    report = json.loads(result.report_path.read_text())
    assert list(report["tensors"]) == list(result.reports)
    assert report["name"] == "R-TSVM of expert0, expert1" and report["engine"] == "local"
    assert report["recipe_yaml"] == (tmp_path / "out" / "merge_recipe.yaml").read_text()
    assert report["stages"].keys() == {"read", "merge", "statistics", "spectral", "write"}
    for stage, spent in report["stages"].items():
        times = [e["stages"][stage] for e in report["tensors"].values() if stage in e["stages"]]
        assert spent == pytest.approx({"wall": sum(w for w, _ in times), "cpu": sum(c for _, c in times)})
        assert spent["wall"] > 0 and spent["cpu"] >= 0
    assert report["stages"]["merge"]["wall"] > sum(report["stages"][s]["wall"] for s in ("statistics", "spectral"))

    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, entry in report["tensors"].items():
        assert entry["bytes"] == merged[name].nbytes and entry["dtype"] == str(merged[name].dtype)[6:]
        assert entry["file"] == "model.safetensors" and tuple(entry["shape"]) == merged[name].shape
        if entry["treatment"] == "base":
            assert entry["task_norms"] == [] and entry["update_norm"] is None
            continue
        start = base[name].double()
        assert entry["task_norms"] == pytest.approx([float((sd[name].double() - start).norm()) for sd in tuned])
        assert entry["update_norm"] == pytest.approx(float((merged[name].double() - start).norm()))
    matrix = report["tensors"]["model.layers.0.mlp.weight"]
    for key in ("ranks", "sparsities", "outlier_masses", "weights", "captured_energy", "interference"):
        assert len(matrix[key]) == 2, key
    assert all(-0.5 < value < 0.5 for value in matrix["interference"])  # independent tasks

    summary = report["summary"]
    assert summary["treatments"] == {"merge": 5, "mean": 2, "base": 3} and summary["tensors"] == 10
    assert summary["elements"] == sum(t.numel() for t in base.values())
    assert summary["largest_error"]["error"] == max(
        e["certificate"]["error"] for e in report["tensors"].values() if e["certificate"]
    )
    floating = [name for name, tensor in base.items() if tensor.is_floating_point()]
    whole = math.sqrt(sum(float((tuned[1][name].double() - base[name].double()).square().sum()) for name in floating))
    assert summary["task_norms"][1] == pytest.approx(whole)


def documented_keys():
    """Return the keys that docs/api/report.md documents, one set for each of its tables."""
    text = (Path(__file__).parents[2] / "docs" / "api" / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        {key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1])} for table in tables
    ]


def test_every_key_of_the_report_is_documented(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    report = json.loads(merge_checkpoints(config_for(paths), tmp_path / "out").report_path.read_text())
    entries = report["tensors"].values()
    certificates = [entry["certificate"] for entry in entries if entry["certificate"]]
    found = [[report], [report["summary"]], entries, certificates]
    for documented, real in zip(documented_keys(), found, strict=True):
        assert real and all(one.keys() == documented for one in real)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_the_report_of_a_resumed_merge_is_that_of_a_whole_one(tmp_path, monkeypatch, out):
    paths, _, _ = family(tmp_path / "in")
    whole = merge_checkpoints(config_for(paths), tmp_path / "whole" / out, threads=1)
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(4, patch)
        merge_checkpoints(config_for(paths), tmp_path / out, threads=1)
    result = merge_checkpoints(config_for(paths), tmp_path / out, threads=2, resume=True)
    assert result.resumed == 4
    expected, got = (json.loads(r.report_path.read_text()) for r in (whole, result))
    assert got["resumed_tensors"] == 4
    assert all({"read", "write"} <= e["stages"].keys() for e in got["tensors"].values())
    assert without_times(got) == without_times(expected)
    page = result.report_path.with_suffix(".html").read_text()
    assert all(name in page for name in got["tensors"])
    if out == "out":
        # The card does not depend on the run, so it is the same.
        assert digest(tmp_path / out)["README.md"] == digest(whole.path)["README.md"]


def test_norms_of_elementwise_merges_on_request(tmp_path, monkeypatch):
    paths, base, tuned = family(tmp_path / "in")
    plain = merge_checkpoints(config_for(paths, "ties"), tmp_path / "plain")
    assert not any(report.task_norms for report in plain.reports.values())
    assert json.loads(plain.report_path.read_text())["summary"]["task_norms"] is None
    config = config_for(paths, "task_arithmetic")
    whole = merge_checkpoints(config, tmp_path / "whole", measure_norms=True)
    monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (1,))  # tiles of one row
    memory = smallest_schedule(make_plan(config, 2**40)).peak_host_bytes
    rows = merge_checkpoints(config, tmp_path / "rows", measure_norms=True, memory=memory, threads=1)
    merged = load_file(tmp_path / "whole" / "model.safetensors")
    for name, report in whole.reports.items():
        if report.treatment == "base":
            continue
        start = base[name].double()
        expected = [*(sd[name].double() - start for sd in tuned), merged[name].double() - start]
        expected = [float(difference.norm()) for difference in expected]
        for found in (report, rows.reports[name]):
            assert [*found.task_norms, found.update_norm] == pytest.approx(expected)
    assert digest(tmp_path / "rows")["model.safetensors"] == digest(tmp_path / "whole")["model.safetensors"]


def test_the_page_is_written_again(tmp_path, capsys):
    paths, _, _ = family(tmp_path / "in")
    for out in ("out", "out.safetensors"):
        result = merge_checkpoints(config_for(paths, "linear"), tmp_path / out)
        page = result.report_path.with_suffix(".html")
        before = page.read_bytes()
        page.unlink()
        assert main(["report", str(tmp_path / out)]) == 0
        assert page.read_bytes() == before and capsys.readouterr().out.strip() == str(page)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"), ("{", "not the report of a merge"), ("[]", "not the report"),
        ('{"tensors": {}}', "not the report"),
    ],
    ids=["missing", "torn", "list", "other"],
)  # fmt: skip
def test_what_is_no_report(tmp_path, content, message):
    if content is not None:
        (tmp_path / "merge_report.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        write_page(tmp_path)
    assert not (tmp_path / "merge_report.html").exists()


def test_the_model_card(tmp_path, monkeypatch):
    paths, _, _ = family(tmp_path / "in")
    (paths[0] / "README.md").write_text("---\nlicense: llama3.1\ntags: [base]\n---\nthe card of the base")
    ids = {"org/base": paths[0], "org/math@v2": paths[1], str(paths[2]): paths[2]}
    monkeypatch.setattr(hub, "_fetch", lambda model, *_: ids[model])
    config = config_for(ids)
    result = merge_checkpoints(config, tmp_path / "out")
    text = (result.path / "README.md").read_text()
    assert "the card of the base" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    # The hub cannot use a path.
    assert front == {
        "base_model": ["org/base", "org/math"], "library_name": "transformers", "tags": ["merge", "r_tsvm_kernels"],
        "license": "llama3.1",
    }  # fmt: skip
    assert "https://arxiv.org/abs/2502.06876" in text and f"* `{paths[2]}`" in text and "* `org/math@v2`" in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert MergeConfig.from_dict(yaml.safe_load(block)) == config
    # The card of a merge does not become that of a merge of it.
    again = merge_checkpoints(config_for([result.path, paths[1]], "linear"), tmp_path / "again")
    assert "org/math" not in (again.path / "README.md").read_text()
    assert not (tmp_path / "again" / "merge_report.html").read_text().count("org/math")
