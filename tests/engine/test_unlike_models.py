"""Models of one architecture that differ in names or settings: matched where that is safe, and said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import CheckpointError, MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.cli import main


def write(folder, tensors, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


def layers(prefix, count=2, value=1.0):
    return {f"{prefix}layers.{i}.q_proj.weight": torch.full((4, 4), value + i) for i in range(count)}


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("language_model.model.", "model.language_model."),
        ("bert.encoder.", "encoder."),
        ("", "model."),
        ("model.", "_orig_mod.model."),
    ],
)
def test_prefixes_of_one_architecture(tmp_path, base, tuned):
    paths = [write(tmp_path / "base", layers(base)), write(tmp_path / "tuned", layers(tuned, value=3.0))]
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == layers(base).keys()
    assert all(torch.equal(merged[name], value) for name, value in layers(base, value=3.0).items())
    assert verify_output(tmp_path / "out", inputs=True).ok


def test_other_modules_are_no_prefix(tmp_path):
    paths = [write(tmp_path / "base", layers("decoder.")), write(tmp_path / "tuned", layers("encoder."))]
    with pytest.raises(CheckpointError, match=r"2 missing .* 2 extra"):
        merge_checkpoints(MergeConfig("ties", base_model=paths[0], models=paths[1:]), tmp_path / "out")


@pytest.mark.parametrize("base", ["language_model.model.", "model.language_model.", "model."])
@pytest.mark.parametrize("adapted", ["language_model.model.", "model.language_model.", "model."])
def test_adapters_of_other_prefixes(tmp_path, base, adapted):
    write(tmp_path / "base", layers(base))
    (tmp_path / "lora").mkdir()
    module = f"base_model.model.{adapted}layers.1.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(1, 4), f"{module}.lora_B.weight": torch.ones(4, 1)}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    command = ["merge", "--base", tmp_path / "base", "--model", tmp_path / "lora", "--method", "task_arithmetic"]
    assert main([*map(str, command), str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[f"{base}layers.1.q_proj.weight"], torch.full((4, 4), 3.0))


@pytest.mark.parametrize("missing", ["error", "base", "mean_of_present"])
def test_experts_in_other_layouts(tmp_path, missing):
    """No choice for missing tensors makes one of the other: it would leave the experts as they are."""
    place = "model.layers.0.mlp.experts"
    single = {f"{place}.{i}.up_proj.weight": torch.ones(4, 4) for i in range(2)}
    packed = {f"{place}.up_proj": torch.ones(2, 4, 4)}
    paths = [write(tmp_path / str(len(own)), {"norm": torch.ones(4)} | own) for own in (single, packed)]
    layouts = "packed", "one by one"
    for base, tuned, (own, other) in ((*paths, layouts), (*paths[::-1], layouts[::-1])):
        config = MergeConfig("ties", base_model=base, models=[tuned], missing=missing)
        with pytest.raises(CheckpointError, match=f"its experts are stored {own}, those of the base {other};"):
            merge_checkpoints(config, tmp_path / "out")
        excluded = config.model_copy(update={"exclude": ("*experts*",)})
        merge_checkpoints(excluded, tmp_path / f"without {own}")


def test_contradicting_configs_are_said(tmp_path, capsys):
    paths = [
        write(tmp_path / "base", layers("model."), {"rope_theta": 1e4, "num_attention_heads": 2}),
        write(tmp_path / "tuned", layers("model."), {"rope_theta": 1e6, "num_attention_heads": 2}),
    ]
    command = ["--base", paths[0], "--model", paths[1], "--method", "linear"]
    assert main(["inspect", *command]) == 0
    assert "rope_theta 1000000.0 instead of 10000.0" in " ".join(capsys.readouterr().out.split())
    assert main(["merge", *command, str(tmp_path / "out")]) == 0
    assert "rope_theta 1000000.0 instead of 10000.0" in capsys.readouterr().err
    assert main(["merge", *command, "--quiet", str(tmp_path / "quiet")]) == 0
    assert not capsys.readouterr().err


def test_layers_behind_the_last_one_are_not_counted(tmp_path):
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    paths = [write(tmp_path / name, layers("model.", 3, value), config) for name, value in (("base", 0.0), ("b", 1.0))]
    sources = [{"model": path, "layer_range": [0, 2]} for path in paths]
    recipe = {"merge_method": "slerp", "base_model": paths[0], "slices": [{"sources": sources}]}
    recipe["parameters"] = {"t": [0.0, 1.0]}
    merge_checkpoints(MergeConfig.from_dict(recipe), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for layer, value in enumerate([0.0, 2.0, 3.0]):
        assert torch.allclose(merged[f"model.layers.{layer}.q_proj.weight"], torch.tensor(value))


def test_a_language_model_is_merged_into_a_multimodal_one(tmp_path):
    vision = {"model.visual.blocks.0.w": torch.ones(3), "lm_head.weight": torch.zeros(5, 4)}
    text = layers("model.", value=3.0) | {"lm_head.weight": torch.ones(5, 4)}
    paths = [write(tmp_path / "base", layers("model.language_model.") | vision), write(tmp_path / "text", text)]
    config = MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:], missing="base")
    merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = layers("model.language_model.", value=3.0) | vision | {"lm_head.weight": text["lm_head.weight"]}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
