"""Excluded tensors are not compared: they may be missing, have another shape, or exist in one model only."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    MergeConfig,
    ModelEntry,
    ShapeError,
    extract_lora,
    merge_checkpoints,
    merge_state_dicts,
    verify_output,
)
from r_tsvm_kernels.cli import main

WEIGHT, HEAD, EXTRA = "model.layers.0.w.weight", "lm_head.weight", "model.vision.proj.weight"


def model(rows=20, seed=0, without=(), **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (rows, 8), WEIGHT: (8, 8), HEAD: (rows, 8), **more}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name not in without}


BASE = model()
CASES = {
    "resized": model(24, 1),
    "without a head": model(seed=1, without=[HEAD]),
    "with one tensor more": model(seed=1, **{EXTRA: (4, 8)}),
}
EXCLUDED = {
    "resized": ("*embed_tokens*", "lm_head*"),
    "without a head": ("lm_head*",),
    "with one tensor more": ("*vision*",),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Return the name of the case, and the folders of a base and a model."""
    folders = []
    for name, tensors in (("base", BASE), ("model", CASES[request.param])):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text("{}")
    return request.param, *folders


def recipe(base, tuned, **options):
    return MergeConfig("task_arithmetic", base_model=str(base), models=(ModelEntry(model=str(tuned)),), **options)


def check(name, merged):
    assert merged.keys() == BASE.keys()
    for tensor in ("model.embed_tokens.weight", HEAD):
        kept = not any(pattern.strip("*") in tensor for pattern in EXCLUDED[name])
        expected = CASES[name].get(tensor) if kept else BASE[tensor]
        assert torch.allclose(merged[tensor], expected, atol=1e-6) if kept else torch.equal(merged[tensor], expected)
    assert torch.allclose(merged[WEIGHT], CASES[name][WEIGHT], atol=1e-6)


def test_a_merge_of_checkpoints(case, tmp_path, capsys):
    name, base, tuned = case
    with pytest.raises((CheckpointError, ShapeError), match="--exclude"):  # the remedy
        merge_checkpoints(recipe(base, tuned), tmp_path / "refused")
    merge_checkpoints(recipe(base, tuned, exclude=EXCLUDED[name]), tmp_path / "out")
    check(name, load_file(tmp_path / "out" / "model.safetensors"))
    found = verify_output(tmp_path / "out", inputs=True)
    assert not (found.missing or found.extra or found.changed or found.inputs_changed)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    dropped = {str(tuned): [EXTRA]} if name == "with one tensor more" else {}
    assert report["dropped"] == dropped
    excluded = [key for key, entry in report["tensors"].items() if entry["reason"] == "excluded by pattern"]
    assert sorted(excluded) == sorted(t for t in BASE if any(p.strip("*") in t for p in EXCLUDED[name]))

    patterns = [word for pattern in EXCLUDED[name] for word in ("--exclude", pattern)]
    command = ["inspect", "--base", str(base), "--model", str(tuned), "--method", "task_arithmetic", *patterns]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == dropped
    assert main(command) == 0
    assert ("dropped: " in capsys.readouterr().out) == bool(dropped)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "tsvm"])
def test_a_merge_in_memory(case, method):
    name, _, _ = case
    with pytest.raises((CheckpointError, ShapeError)):
        merge_state_dicts(BASE, [CASES[name]], method)
    merged = merge_state_dicts(BASE, [CASES[name]], method, exclude=EXCLUDED[name]).state_dict
    assert merged.keys() == BASE.keys()
    for tensor in BASE:
        if any(pattern.strip("*") in tensor for pattern in EXCLUDED[name]):
            assert torch.equal(merged[tensor], BASE[tensor])


def test_an_extraction(case, tmp_path):
    name, base, tuned = case
    with pytest.raises((CheckpointError, ShapeError)):
        extract_lora(str(base), str(tuned), tmp_path / "refused", rank=4)
    result = extract_lora(str(base), str(tuned), tmp_path / "out", rank=4, exclude=EXCLUDED[name])
    assert list(result.modules) == [WEIGHT.removesuffix(".weight")]
    assert result.left_out.keys() == BASE.keys() - {WEIGHT}


def test_a_pattern_without_a_match(case, tmp_path):
    _, base, tuned = case
    with pytest.raises(ConfigError, match="'\\*heads\\*' matches no tensor"):
        merge_checkpoints(recipe(base, tuned, exclude=("*heads*",)), tmp_path / "out")


def test_include_leaves_the_others_alone(tmp_path):
    merged = merge_state_dicts(BASE, [CASES["resized"]], "task_arithmetic", include=("*layers*",)).state_dict
    assert torch.equal(merged[HEAD], BASE[HEAD])
    assert torch.allclose(merged[WEIGHT], CASES["resized"][WEIGHT], atol=1e-6)
