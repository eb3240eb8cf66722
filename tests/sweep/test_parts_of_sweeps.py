"""How a sweep stores the parts that its candidates share."""

import json

import pytest
import torch
from safetensors.torch import save_file

from r_tsvm_kernels import MergeConfig, sweep_checkpoints
from r_tsvm_kernels.sweep import merger, plan_sweep


@pytest.mark.parametrize(
    "side, device, kind", [(288, "cpu", "dense"), (96, "cpu", "factors"), (288, "cuda", "factors")]
)
def test_parts_of_high_rank_are_matrices_on_a_cpu(side, device, kind, tmp_path, monkeypatch):
    """Factors of rank 96 take longer to multiply than matrices to read, those of rank 32 do not, nor does a GPU."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(4)]
    for seed, path in enumerate(paths):
        save_file({"w": torch.randn(side, side, generator=torch.Generator().manual_seed(seed))}, path)
    config = MergeConfig("tsvm", base_model=str(paths[0]), models=list(map(str, paths[1:])))
    monkeypatch.setattr(merger, "choose_device", lambda name: torch.device(device))
    grids, found = {"alpha": [0.5, 1]}, []
    (group,) = plan_sweep(config, grids=grids).groups
    assert group.bytes_of_parts == 4 * side**2 * (3 if kind == "dense" else 2)

    def evaluate(path):
        for parts in (tmp_path / "out" / "work").glob("parts-*/parts.json"):  # none any more for the last candidate
            found.append(json.loads(parts.read_text())["tensors"]["w"]["kind"])
        return 1.0

    sweep_checkpoints(config, tmp_path / "out", grids=grids, evaluate=evaluate, device="cpu")
    assert found == [kind]
