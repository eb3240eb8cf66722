"""Recipes of several documents: merges whose outputs are models of others."""

import pytest
import torch
from adapters import dense_updates, random_adapter
from checkpoints import digest, save
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    MergeConfig,
    OutputExistsError,
    OutputUnfinishedError,
    ResumeRefusedError,
    merge_checkpoints,
    verify_output,
)
from r_tsvm_kernels.plan import make_plan

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("q", "up")]


@pytest.fixture
def models(tmp_path):
    """Folders of four models, and their tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: {key: torch.randn(12, 8, generator=generator) for key in NAMES} for name in "abcd"}
    return {name: str(save(tmp_path / "in" / name, own)) for name, own in tensors.items()}, tensors


@pytest.fixture
def recipe(models):
    paths, _ = models
    return MergeConfig.from_documents(
        [
            {"name": "ab", "merge_method": "linear", "models": [paths["a"], paths["b"]]},
            {"name": "abc", "merge_method": "linear", "models": ["ab", paths["c"]]},
            {"merge_method": "task_arithmetic", "base_model": "ab", "models": ["abc", paths["d"]],
             "parameters": {"weight": 0.5}},
        ]
    )  # fmt: skip


def expected(tensors):
    a, b, c, d = tensors.values()
    ab = {name: (a[name] + b[name]) / 2 for name in NAMES}
    abc = {name: (ab[name] + c[name]) / 2 for name in NAMES}
    return {name: ab[name] + 0.5 * (abc[name] - ab[name]) + 0.5 * (d[name] - ab[name]) for name in NAMES}


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def stop_at(count):
    """A progress callback that stops the merges after so many tensors of all documents."""
    seen = []

    def stop(state):
        seen.append(state.tensor)
        if len(seen) == count:
            raise KeyboardInterrupt

    return stop


def test_outputs_of_documents_are_models_of_others(models, recipe, tmp_path):
    out = tmp_path / "out"
    result = merge_checkpoints(recipe, out)
    got = load_file(out / "model.safetensors")
    for name, tensor in expected(models[1]).items():
        assert (got[name] - tensor).abs().max() < 1e-6
    assert result.path == out and verify_output(out).ok
    with pytest.raises(CheckpointError, match=r"its input ab is the output of a step .* --steps DIR"):
        verify_output(out, inputs=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # nothing is left of the steps
    assert MergeConfig.from_yaml(out / "merge_recipe.yaml") == recipe
    assert str(tmp_path / ".out.steps") not in (out / "README.md").read_text()


def test_steps_are_kept_and_used_again(models, recipe, tmp_path):
    kept = tmp_path / "kept"
    merge_checkpoints(recipe, tmp_path / "out", steps=kept)
    before = digest(kept)
    assert sorted(path.name for path in kept.iterdir()) == ["ab", "abc"]
    assert verify_output(tmp_path / "out", inputs=True).ok and verify_output(kept / "abc", inputs=True).ok
    seen = []
    merge_checkpoints(recipe, tmp_path / "again", steps=kept, progress=seen.append)
    assert len(seen) == len(NAMES) and digest(kept) == before
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "out")
    again = MergeConfig.from_yaml(kept / "abc" / "merge_recipe.yaml")  # is complete by itself
    merge_checkpoints(again, tmp_path / "abc")
    assert weights_of(tmp_path / "abc") == weights_of(kept / "abc")
    other = recipe.model_copy(update={"steps": {**recipe.steps, "ab": MergeConfig("linear", models=[models[0]["a"]])}})
    with pytest.raises(OutputExistsError, match=r"kept/ab: finished before, but the merge has changed \(recipe"):
        merge_checkpoints(other, tmp_path / "other", steps=kept)
    assert digest(kept) == before


@pytest.mark.parametrize("count", [2, 4, 7, 10])
def test_stopped_merges_resume_to_the_same_bytes(recipe, tmp_path, count):
    merge_checkpoints(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(recipe, tmp_path / "out", threads=1, progress=stop_at(count))
    with pytest.raises(OutputUnfinishedError, match=r"several documents into .*out was stopped; --resume"):
        merge_checkpoints(recipe, tmp_path / "out")
    seen = []
    merge_checkpoints(recipe, tmp_path / "out", resume=True, progress=seen.append)
    assert len(seen) <= 3 * len(NAMES) - count + 1
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_changed_input_of_a_finished_step_is_refused(models, recipe, tmp_path):
    paths, tensors = models
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(recipe, tmp_path / "out", threads=1, progress=stop_at(7))
    save_file({name: tensor + 1 for name, tensor in tensors["a"].items()}, f"{paths['a']}/model.safetensors")
    with pytest.raises(ResumeRefusedError, match=r"ab: finished before, but the merge has changed \(the input .*/a/"):
        merge_checkpoints(recipe, tmp_path / "out", resume=True)
    merge_checkpoints(recipe, tmp_path / "out", restart=True)
    changed = expected({**tensors, "a": {name: tensor + 1 for name, tensor in tensors["a"].items()}})
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert (got[NAMES[0]] - changed[NAMES[0]]).abs().max() < 1e-6


def test_a_folder_of_somebody_else_is_not_removed(recipe, tmp_path):
    (tmp_path / ".out.steps").mkdir()
    (tmp_path / ".out.steps" / "notes.txt").write_text("mine")
    for options in ({}, {"restart": True}):
        with pytest.raises(OutputUnfinishedError, match="not left by this merge of several documents"):
            merge_checkpoints(recipe, tmp_path / "out", **options)
    assert (tmp_path / ".out.steps" / "notes.txt").read_text() == "mine"


def test_an_output_that_exists_is_refused_before_any_step(recipe, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputExistsError):
        merge_checkpoints(recipe, tmp_path / "out", progress=lambda state: pytest.fail("merged"))


def test_a_plan_of_the_last_document_needs_the_others(recipe):
    with pytest.raises(ConfigError, match="ab is the output of another document"):
        make_plan(recipe, 10**9)


def test_a_base_with_an_adapter_is_made_a_model_first(models, tmp_path):
    paths, tensors = models
    adapter = random_adapter(tmp_path / "lora", 1, rank=2, shapes={"layers.0.q": (12, 8)})
    base = f"{paths['a']}+{adapter}"
    config = MergeConfig("task_arithmetic", base_model=base, models=[base, paths["b"]], weight=[1.0, 0.5])
    result = merge_checkpoints(config, tmp_path / "out")
    got, own = load_file(result.path / "model.safetensors"), tensors["a"]["layers.0.q.weight"].double()
    own = own + dense_updates(adapter)["layers.0.q"]
    want = own + 0.5 * (tensors["b"]["layers.0.q.weight"].double() - own)
    assert (got["layers.0.q.weight"] - want).abs().max() < 1e-6
    again = MergeConfig.from_yaml(result.path / "merge_recipe.yaml")
    assert list(again.steps) == ["base_with_adapter"] and again.steps["base_with_adapter"].models[0].model == base
