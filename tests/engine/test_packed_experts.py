"""Packed experts on disk: merged one by one, within a memory limit that holds one expert, and reported one by one."""

import json

import pytest
import torch
from checkpoints import save
from compare import same_bits
from safetensors.torch import load_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_state_dicts, verify_output
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import scheduling
from r_tsvm_kernels.engine.scheduling import make_schedule, smallest_schedule
from r_tsvm_kernels.plan import make_plan

NAME, BIAS, ROUTER = (
    f"model.layers.0.mlp.{end}" for end in ("experts.down_proj", "experts.down_proj_bias", "gate.weight")
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    generator = torch.Generator().manual_seed(0)
    shapes = {NAME: (6, 20, 12), BIAS: (6, 20), ROUTER: (6, 20)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [{n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    paths = [
        save(folder / name, tensors) for name, tensors in zip(("base", "a", "b", "c"), [base, *tuned], strict=True)
    ]
    return paths, base, tuned


def config(paths, method, **fields):
    return MergeConfig(method, base_model=paths[0], models=paths[1:], **fields)


@pytest.mark.parametrize("method", ["rtsvm", "ties", "dare_linear"])
def test_the_same_from_disk_and_from_memory_in_any_tiles(models, tmp_path, monkeypatch, method):
    paths, base, tuned = models
    own = {} if method == "rtsvm" else {"density": 0.4}
    merged = merge_state_dicts(base, tuned, method, **own)
    found = {}
    for elements in (1 << 20, 2 * 240, 1):  # all experts in one tile, two, one
        monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (elements,))
        out = tmp_path / str(elements)
        result = merge_checkpoints(config(paths, method, **own), out, threads=2)
        assert same_bits(load_file(out / "model.safetensors")[NAME], merged.state_dict[NAME])
        assert verify_output(out).ok
        report = json.loads((out / "merge_report.json").read_text())["tensors"][NAME]
        found[elements] = {key: value for key, value in report.items() if key not in ("seconds", "stages")}
        assert [block.part for block in result.reports[NAME].blocks] == [f"[{i}]" for i in range(6)]
    assert found[1] == found[2 * 240] == found[1 << 20]


def test_report_and_inspect_show_experts_as_matrices(models, tmp_path, capsys):
    paths, _, _ = models
    result = merge_checkpoints(config(paths, "tsvm", router="mean"), tmp_path / "out")
    report = json.loads(result.report_path.read_text())
    blocks = report["tensors"][NAME]["blocks"]
    assert all(len(block["interference"]) == 2 and block["ranks"] == [4, 4, 4] for block in blocks)
    assert report["summary"]["tensors"] == 3 and sum(report["summary"]["routes"].values()) == 6
    assert f'"{NAME}[5]"' in (tmp_path / "out" / "merge_report.html").read_text()
    assert "router: mean" in (tmp_path / "out" / "merge_recipe.yaml").read_text()
    arguments = ["--base", str(paths[0]), "--model", str(paths[1]), "--method", "tsvm", "--router", "base"]
    assert main(["inspect", "--json", *arguments]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert (
        tensors[NAME]["matrices"] == 6
        and tensors[NAME]["matrix_shape"] == [20, 12]
        and tensors[NAME]["rank_limit"] == 12
    )
    assert tensors[BIAS]["treatment"] == "mean" and tensors[ROUTER]["treatment"] == "base"
    assert main(["inspect", *arguments, "--estimate-time"]) == 0
    assert "6 matrices of at most 20x12" in capsys.readouterr().out


@pytest.mark.parametrize("solver", ["eigen", "products"])
def test_the_limit_need_not_hold_the_tensor(tmp_path, solver):
    experts = {"experts.down_proj": torch.zeros(64, 256, 256, dtype=torch.bfloat16)}
    paths = [save(tmp_path / name, experts) for name in ("base", "a", "b")]
    plan = make_plan(config(paths, "tsvm", solver=solver), 10**9)
    smallest = smallest_schedule(plan)
    together = smallest.tensors["experts.down_proj"].tile_rows
    assert together == (1 if solver == "eigen" else 8)  # experts of a batch stay together
    one = make_plan(
        config([save(tmp_path / f"one_{p.name}", {"w": torch.zeros(256, 256)}) for p in paths], "tsvm"), 10**9
    )
    if solver == "eigen":
        tile, matrix = smallest.tensors["experts.down_proj"], smallest_schedule(one).tensors["w"]
        assert tile.inputs + tile.work < 1.2 * (matrix.inputs + matrix.work)
    assert make_schedule(plan, 1, smallest.peak_host_bytes).peak_host_bytes == smallest.peak_host_bytes
