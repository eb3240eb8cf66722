"""Merges of checkpoints that overflow: refused by the name of the tensor, and nothing is published."""

import json

import pytest
import torch
from merging import DTYPES, group
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import ConfigError, MergeConfig, NonFiniteError, merge_checkpoints, merge_state_dicts
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.methods import METHODS

SCALED = sorted(name for name, method in METHODS.items() if "alpha" in method.parameters.model_fields)


def files(tmp_path, base, tuned):
    """Save the tensors, and return the recipe's paths of base and model."""
    for name, tensor in (("base", base), ("tuned", tuned)):
        save_file({"layers.0.w": tensor.contiguous()}, tmp_path / f"{name}.safetensors")
    return {
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [{"model": str(tmp_path / "tuned.safetensors")}],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", SCALED)
def test_alpha(tmp_path, method, dtype):
    base, (tuned,) = group(dtype=dtype, tasks=1)
    paths = files(tmp_path, 1000 * base, 1000 * tuned)
    largest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).max
    with pytest.raises(NonFiniteError, match=r"layers\.0\.w"):
        merge_checkpoints(MergeConfig(method, **paths, parameters={"alpha": largest}), tmp_path / "out.safetensors")
    if dtype != torch.float64:  # known before anything is read
        with pytest.raises(ConfigError, match=r"layers\.0\.w: alpha is 1e\+39, beyond float32"):
            merge_checkpoints(MergeConfig(method, **paths, parameters={"alpha": 1e39}), tmp_path / "new.safetensors")
        assert not list(tmp_path.glob(".new*"))
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"nuslerp"}))  # it takes two models
def test_differences(tmp_path, method, dtype):
    base, (tuned,) = group(dtype=dtype, tasks=1)
    base[3, 4], tuned[3, 4] = 0.9 * torch.finfo(dtype).max, -0.9 * torch.finfo(dtype).max
    recipe, out = MergeConfig(method, **files(tmp_path, base, tuned)), tmp_path / "out.safetensors"
    try:
        merge_checkpoints(recipe, out)
    except NonFiniteError as error:
        assert "layers.0.w" in str(error) and not out.exists()
        return
    got = load_file(out)["layers.0.w"]
    assert bool(got.isfinite().all())
    models = [tuned, base] if recipe.base_joins else [tuned]
    same = MergeConfig(method, models=[{}] * len(models))
    want = merge_state_dicts({"layers.0.w": base}, [{"layers.0.w": model} for model in models], same).state_dict
    assert torch.equal(got, want["layers.0.w"])


def test_the_command_says_which_tensor(tmp_path, capsys):
    base, (tuned,) = group(tasks=1)
    paths = files(tmp_path, base, tuned)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"merge_method": "ties", **paths, "parameters": {"lambda": 1e39}}))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 2
    assert "layers.0.w: alpha is 1e+39, beyond float32" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    recipe.write_text(json.dumps({"merge_method": "ties", **paths}))
    merge_checkpoints(str(recipe), tmp_path / "out.safetensors")  # a path in place of a config
    want = merge_state_dicts({"layers.0.w": base}, [{"layers.0.w": tuned}], "ties").state_dict
    assert torch.equal(load_file(tmp_path / "out.safetensors")["layers.0.w"], want["layers.0.w"])
