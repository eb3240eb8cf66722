import pytest
import torch
from checkpoints import family, save, state_dict, tuned_state_dict

from r_tsvm_kernels import CheckpointError, ConfigError, MergeConfig, ShapeError
from r_tsvm_kernels.checkpoint import make_plan


def config_for(paths, method="tsvm", **fields):
    base, *tuned = paths
    models = tuple({"model": str(path)} for path in tuned)
    return MergeConfig(merge_method=method, base_model=None if base is None else str(base), models=models, **fields)


def test_what_happens_to_each_tensor(tmp_path):
    paths, base, _ = family(tmp_path)
    plan = make_plan(config_for(paths, exclude=("*.1.mlp*",)), 10**9)
    kinds = {name: (t.treatment.kind, t.treatment.reason) for name, t in plan.tensors.items()}
    assert kinds == {
        "model.embed_tokens.weight": ("merge", ""),
        "model.layers.0.attn.weight": ("merge", ""),
        "model.layers.0.mlp.weight": ("merge", ""),
        "model.layers.1.attn.weight": ("merge", ""),
        "model.layers.1.mlp.weight": ("base", "excluded by pattern"),
        "model.norm.weight": ("mean", "not a matrix"),
        "scale": ("mean", "not a matrix"),
        "position_ids": ("base", "int64 buffer"),
        "mask": ("base", "bool buffer"),
        "nothing": ("base", "empty"),
    }
    assert plan.bytes_written == sum(t.numel() * t.element_size() for t in base.values())
    touched = plan.bytes_written - sum(
        base[n].numel() * base[n].element_size() for n, (k, _) in kinds.items() if k == "base"
    )
    assert plan.bytes_read == plan.bytes_written + 2 * touched


def test_shards_and_dtype_of_the_output(tmp_path):
    paths, base, _ = family(tmp_path)
    plan = make_plan(config_for(paths, out_dtype="bfloat16"), 3000)
    assert len(plan.shards) > 1
    assert sorted(name for shard in plan.shards.values() for name in shard) == sorted(base)
    for name, tensor in plan.tensors.items():
        assert tensor.spec.dtype == (torch.bfloat16 if base[name].is_floating_point() else base[name].dtype)


def test_a_listed_base_is_no_task_but_a_model_of_an_average(tmp_path):
    paths, _, _ = family(tmp_path)
    listed = [paths[0], paths[0], *paths[1:]]
    assert len(make_plan(config_for(listed, "task_arithmetic"), 10**9).tuned) == 2
    assert len(make_plan(config_for([paths[0], tmp_path / "expert0" / ".." / "base", *paths[1:]]), 10**9).tuned) == 2
    assert len(make_plan(config_for(listed, "linear"), 10**9).tuned) == 3


def test_an_average_needs_no_base(tmp_path):
    paths, _, _ = family(tmp_path)
    assert make_plan(config_for([None, *paths], "linear"), 10**9).base.path == paths[0]
    with pytest.raises(ConfigError, match="tsvm needs base_model"):
        make_plan(config_for([None, *paths]), 10**9)


def test_no_models(tmp_path):
    paths, _, _ = family(tmp_path)
    with pytest.raises(ConfigError, match="no fine-tuned models"):
        make_plan(config_for([paths[0], paths[0]]), 10**9)
    with pytest.raises(ConfigError, match="needs a `model`"):
        make_plan(MergeConfig(base_model=str(paths[0]), models=({},)), 10**9)


def changed(tmp_path, change):
    paths, _, tuned = family(tmp_path)
    change(tuned[0])
    return [*paths, save(tmp_path / "odd", tuned[0])]


def test_tensors_that_do_not_fit(tmp_path):
    cases = {
        "missing": (lambda sd: sd.pop("scale"), CheckpointError, r"odd: .*1 missing \(scale\)"),
        "extra": (lambda sd: sd.update(more=torch.ones(2)), CheckpointError, r"odd: .*1 extra \(more\)"),
        "shape": (lambda sd: sd.update({"scale": torch.ones(1)}), ShapeError, r"odd: scale has shape \(1,\)"),
        "vocabulary": (
            lambda sd: sd.update({"model.embed_tokens.weight": torch.ones(51, 16)}), ShapeError, "vocabulary resized",
        ),
        "dtype": (lambda sd: sd.update({"scale": torch.tensor(1)}), CheckpointError, "odd: scale is torch.int64"),
    }  # fmt: skip
    for name, (change, error, message) in cases.items():
        with pytest.raises(error, match=message):
            make_plan(config_for(changed(tmp_path / name, change)), 10**9)


def tied(tmp_path, heads):
    """Base and two experts with tied embeddings; `heads[i]` says whether, and how, the copy is stored."""
    base = state_dict(0)
    members = [base, tuned_state_dict(base, 1), tuned_state_dict(base, 2)]
    paths = []
    for i, (tensors, head) in enumerate(zip(members, heads, strict=True)):
        if head:
            tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        paths.append(save(tmp_path / f"m{i}", tensors, config={"tie_word_embeddings": True}))
    return paths


@pytest.mark.parametrize("heads", [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)], ids=str)
def test_tied_heads_are_not_tensors_of_their_own(tmp_path, heads):
    plan = make_plan(config_for(tied(tmp_path, heads)), 10**9)
    assert "lm_head.weight" not in plan.tensors
    assert len(plan.tied_heads) == sum(heads)


def test_untied_heads_are(tmp_path):
    base = state_dict(0) | {"lm_head.weight": torch.ones(50, 16)}
    paths = [save(tmp_path / f"m{i}", base, config={"tie_word_embeddings": False}) for i in range(2)]
    assert "lm_head.weight" in make_plan(config_for(paths), 10**9).tensors
