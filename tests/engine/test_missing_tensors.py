"""`missing`: tensors that only some models have keep the base's value, or get the mean of the models that have them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    MergeConfig,
    ShapeError,
    merge_checkpoints,
    merge_state_dicts,
    verify_output,
)
from r_tsvm_kernels.cli import main

W, HEAD, SCORE, IDS = "model.layers.0.w.weight", "lm_head.weight", "score.weight", "extra_ids"


def model(seed, *without, **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = {W: (8, 8), HEAD: (20, 8), **more}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name not in without}


BASE = model(0)
TUNED = [model(1, HEAD), model(2, **{SCORE: (2, 8)}) | {IDS: torch.arange(3)}, model(3, **{SCORE: (2, 8)})]


@pytest.fixture
def folders(tmp_path):
    """Write the base and the models."""
    paths = [tmp_path / name for name in ("base", "a", "b", "c")]
    for path, tensors in zip(paths, [BASE, *TUNED], strict=True):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text("{}")
    return paths


def expected(policy, method):
    """Everything but W, by the policy."""
    if policy == "base":
        return {HEAD: BASE[HEAD]}
    heads = [TUNED[1][HEAD], TUNED[2][HEAD]] + ([BASE[HEAD]] if method == "linear" else [])
    return {HEAD: sum(heads) / len(heads), SCORE: (TUNED[1][SCORE] + TUNED[2][SCORE]) / 2}


@pytest.mark.parametrize("policy", ["base", "mean_of_present"])
@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm", "linear"])
def test_policies(folders, tmp_path, policy, method):
    paths = [str(path) for path in folders]
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], missing=policy)
    assert MergeConfig.from_yaml(_written(config, tmp_path)) == config
    result = merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    in_memory = (
        merge_state_dicts(BASE, TUNED, method if method != "linear" else config, missing=policy)
        if (method != "linear")
        else merge_state_dicts(BASE, TUNED, config)
    )
    wanted = expected(policy, method)
    assert merged.keys() == in_memory.state_dict.keys() == {W, *wanted}
    for name, value in wanted.items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
        assert torch.allclose(in_memory.state_dict[name], value, atol=1e-6), name
        assert result.reports[name].treatment == ("base" if policy == "base" else "mean")
        assert in_memory.reports[name].treatment == result.reports[name].treatment
    assert torch.allclose(merged[W], in_memory.state_dict[W])
    assert verify_output(tmp_path / "out", inputs=True).ok
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["dropped"][paths[2]] == ([IDS, SCORE] if policy == "base" else [IDS])
    assert any("a: no lm_head.weight" in note for note in report["notes"])


def _written(config, tmp_path):
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    return tmp_path / "recipe.yaml"


def test_a_single_value_keeps_its_bits(folders, tmp_path):
    command = ["--base", folders[0], "--model", folders[1], "--model", folders[3], "--method", "ties"]
    command = [str(word) for word in command]
    assert main(["merge", *command, "--missing", "mean_of_present", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[HEAD], TUNED[2][HEAD])
    assert torch.equal(merged[SCORE], TUNED[2][SCORE])


def test_the_refusal_names_remedies_that_work(folders, tmp_path, capsys):
    command = ["merge", "--base", str(folders[0]), "--model", str(folders[1]), "--method", "ties"]
    assert main([*command, str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "--exclude 'lm_head.weight'" in message
    assert "--missing base" in message
    assert main([*command, "--exclude", HEAD, str(tmp_path / "out1")]) == 0
    assert main([*command, "--missing", "base", str(tmp_path / "out2")]) == 0
    assert "note: " in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="1 missing"):
        merge_state_dicts(BASE, TUNED[:1], "ties")


def test_what_only_the_base_has_stays(folders):
    merged = merge_state_dicts(BASE, TUNED[:1], "ties", missing="mean_of_present")
    assert torch.equal(merged.state_dict[HEAD], BASE[HEAD])


@pytest.mark.parametrize("holder", ["base", "tuned", "both"])
def test_averages_of_training(tmp_path, holder):
    """A checkpoint may hold moving averages of its weights beside them, which most fine-tunes drop."""
    averages = {"model_ema.layers0wweight": torch.ones(8, 8), "model_ema.num_updates": torch.tensor(9)}
    tensors = {"base": dict(BASE), "tuned": model(1)}
    for name, own in tensors.items():
        if holder in (name, "both"):
            own |= {key: value + (name == "tuned") for key, value in averages.items()}
        save_file(own, tmp_path / f"{name}.safetensors")
    base, tuned = (str(tmp_path / f"{name}.safetensors") for name in tensors)
    if holder != "both":
        with pytest.raises(CheckpointError, match=r"2 (missing|extra).*model_ema"):
            merge_checkpoints(MergeConfig("ties", base_model=base, models=[tuned]), tmp_path / "refused")
    kept = {"missing": "base"} if holder != "both" else {"exclude": ["model_ema.*"]}
    merge_checkpoints(MergeConfig("ties", base_model=base, models=[tuned], **kept), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == tensors["base"].keys() and torch.allclose(merged[W], tensors["tuned"][W], atol=1e-6)
    assert all(torch.equal(merged[name], averages[name]) for name in merged.keys() & averages.keys())


def test_models_that_differ_where_the_base_has_nothing(tmp_path):
    """The message compares them with each other, not with a tensor that the base does not have."""
    paths = {}
    for name, added in (("base", {}), ("a", {SCORE: torch.ones(2, 8)}), ("b", {SCORE: torch.ones(3, 8)})):
        (tmp_path / name).mkdir()
        save_file({W: torch.ones(8, 8), **added}, tmp_path / name / "model.safetensors")
        paths[name] = str(tmp_path / name)
    config = MergeConfig("ties", base_model=paths["base"], models=[paths["a"], paths["b"]], missing="mean_of_present")
    with pytest.raises(ShapeError, match=rf"b: {SCORE} has shape \(3, 8\), .*a has \(2, 8\), and the base has no such"):
        merge_checkpoints(config, tmp_path / "out")
    merge_checkpoints(config.model_copy(update={"exclude": (SCORE,)}), tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [W]


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("policy", ["error", "base", "mean_of_present"])
@pytest.mark.parametrize("holder", ["base", "tuned"])
def test_tables_that_models_compute_anew_may_be_missing(tmp_path, policy, holder):
    """Checkpoints of older libraries store them; the output has those of the base."""
    own = {name: model(seed) for seed, name in enumerate(("base", "tuned"))}
    own[holder][FREQUENCIES] = torch.arange(4.0)
    for name, tensors in own.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    paths = [str(tmp_path / name) for name in own]
    config = MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:], missing=policy)
    merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    in_memory = merge_state_dicts(own["base"], [own["tuned"]], "task_arithmetic", missing=policy).state_dict
    for found in (merged, in_memory):
        assert found.keys() == own["base"].keys()
        assert torch.allclose(found[W], own["tuned"][W], atol=1e-6)
    if holder == "base":
        assert torch.equal(merged[FREQUENCIES], own["base"][FREQUENCIES])
