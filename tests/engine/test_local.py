import json
import os

import oracle
import pytest
import torch
from checkpoints import digest, family, save, state_dict, tuned_state_dict
from compare import relative_error, same_bits
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    DeviceError,
    MergeConfig,
    NonFiniteError,
    OutputExists,
    merge_checkpoints,
    merge_state_dicts,
)
from r_tsvm_kernels.methods import METHODS


def config_for(paths, method="rtsvm", **fields):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned), **fields)


def load(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_as_merging_the_state_dicts(tmp_path, method, dtype):
    paths, base, tuned = family(tmp_path / "in", tasks=3, dtype=dtype)
    config = config_for(paths, method)
    result = merge_checkpoints(config, tmp_path / "out", shard_size=3000)
    merged = load(tmp_path / "out")
    expected = merge_state_dicts(base, tuned, config)
    assert merged.keys() == base.keys() == result.reports.keys()
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.state_dict.items())


@pytest.mark.parametrize("tasks", [1, 8])
def test_few_and_many_tasks_against_float64(tmp_path, tasks):
    paths, base, tuned = family(tmp_path / "in", tasks=tasks)
    for method, truth in (("tsvm", oracle.tsvm), ("rtsvm", lambda b, t: oracle.rtsvm(b, t)[0])):
        merge_checkpoints(config_for(paths, method, out_dtype="float64"), tmp_path / method)
        merged = load(tmp_path / method)
        for name, tensor in base.items():
            if tensor.is_floating_point() and tensor.numel():
                start = tensor.double().numpy()
                exact = truth(start, [sd[name].double().numpy() for sd in tuned])
                assert relative_error(merged[name] - tensor.double(), exact - start) < 1e-4, name


def test_the_output_folder(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (paths[0] / "generation_config.json").write_text('{"a": 1}')
    (paths[0] / "modeling_toy.py").write_text("x = 1")
    (paths[0] / "LICENSE.txt").write_text("free")
    (paths[0] / "README.md").write_text("the card of the base")
    (paths[0] / ".hidden.json").write_text("{}")
    (paths[0] / "pytorch_model.bin").write_text("old weights")
    before = digest(tmp_path / "in")
    result = merge_checkpoints(config_for(paths, out_dtype="bfloat16"), tmp_path / "out", shard_size=3000)
    assert digest(tmp_path / "in") == before
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert [name for name in names if name not in shards] == [
        "LICENSE.txt", "config.json", "generation_config.json", "merge_recipe.yaml", "merge_report.json",
        "model.safetensors.index.json", "modeling_toy.py", "tokenizer.json",
    ]  # fmt: skip
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert MergeConfig.from_yaml(tmp_path / "out" / "merge_recipe.yaml").merge_method == "rtsvm"
    report = json.loads(result.report_path.read_text())
    assert report["tensors"]["model.layers.0.attn.weight"]["ranks"]
    assert report["tensors"]["model.layers.0.attn.weight"]["certificate"]["route"] == "gram-float64"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nested_dtypes_in_the_config_follow(tmp_path):
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "layers": 2}}
    paths, _, _ = family(tmp_path / "in", config=config)
    merge_checkpoints(config_for(paths, "linear", out_dtype="float16"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "dtype": "float16", "text_config": {"torch_dtype": "float16", "layers": 2},
    }  # fmt: skip


def test_bare_files_in_and_out(tmp_path):
    base = state_dict(0)
    tuned = [tuned_state_dict(base, seed) for seed in (1, 2)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, tensors in zip(files, (base, *tuned), strict=True):
        save_file(tensors, file)
    result = merge_checkpoints(config_for(files), tmp_path / "deep" / "out.safetensors")
    merged = load_file(tmp_path / "deep" / "out.safetensors")
    expected = merge_state_dicts(base, tuned, config_for(files)).state_dict
    assert all(same_bits(merged[name], expected[name]) for name in base)
    assert result.report_path == tmp_path / "deep" / "out.merge_report.json"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out.merge_report.json", "out.safetensors"]


def test_progress_counts_tensors_and_bytes(tmp_path):
    paths, base, _ = family(tmp_path / "in")
    seen = []
    merge_checkpoints(config_for(paths), tmp_path / "out", progress=seen.append)
    assert [state.tensors_done for state in seen] == list(range(1, len(base) + 1))
    assert {state.tensors_total for state in seen} == {len(base)}
    assert seen[-1].bytes_done == seen[-1].bytes_total > 0
    assert {state.tensor for state in seen} == base.keys()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set_and_put_back(tmp_path, threads):
    paths, _, _ = family(tmp_path / "in")
    before, seen = torch.get_num_threads(), []
    merge_checkpoints(
        config_for(paths), tmp_path / "out", threads=threads, progress=lambda _: seen.append(torch.get_num_threads())
    )
    assert set(seen) == {threads} and torch.get_num_threads() == before


def test_an_empty_folder_may_be_the_output(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / "out").mkdir()
    merge_checkpoints(config_for(paths, "linear"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_tied_heads_are_compared_and_left_out(tmp_path):
    base = state_dict(0)
    members = [base, tuned_state_dict(base, 1), tuned_state_dict(base, 2)]
    members[1]["lm_head.weight"] = members[1]["model.embed_tokens.weight"].clone()
    paths = [save(tmp_path / f"m{i}", sd, config={"tie_word_embeddings": True}) for i, sd in enumerate(members)]
    merge_checkpoints(config_for(paths), tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    members[1]["lm_head.weight"][3, 3] += 1
    save_file(members[1], paths[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"m1: the base ties lm_head\.weight"):
        merge_checkpoints(config_for(paths), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# --- failures: a clear error, no output, no leftovers, inputs untouched ---------------------------------------------


def fails(tmp_path, config, error, message, out="out", **options):
    before = digest(tmp_path)
    with pytest.raises(error, match=message):
        merge_checkpoints(config, tmp_path / out, **options)
    assert digest(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_non_finite_values(tmp_path, bad, position):
    paths, base, tuned = family(tmp_path / "in", shards=(1,))
    broken = (base, *tuned)[position]
    broken["model.layers.1.mlp.weight"][5, 5] = bad
    save_file(broken, paths[position] / "model.safetensors")
    owner = "the base" if position == 0 else str(paths[position])
    fails(tmp_path, config_for(paths), NonFiniteError, f"model.layers.1.mlp.weight of {owner}: 1 of 512")


def test_an_output_in_use(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    fails(tmp_path, config_for(paths), OutputExists, "already in use")
    fails(tmp_path, config_for(paths), OutputExists, "already in use", out="out/thesis.txt")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    fails(tmp_path, config_for(paths), OutputExists, "already in use", out="link")
    (tmp_path / "dir.safetensors").mkdir()
    fails(tmp_path, config_for(paths), OutputExists, "a folder", out="dir.safetensors")


def test_an_output_that_cannot_be_made(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    fails(tmp_path, config_for(paths), CheckpointError, "cannot be written", out="file/out")


def test_a_missing_tensor_leaves_nothing(tmp_path):
    paths, _, tuned = family(tmp_path / "in", shards=(1,))
    del tuned[1]["scale"]
    save_file(tuned[1], paths[2] / "model.safetensors")
    fails(tmp_path, config_for(paths), CheckpointError, "1 missing", out="new/deep/out")
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_nothing(tmp_path):
    paths, _, _ = family(tmp_path / "in")

    def interrupt(state):
        if state.tensors_done == 3:
            raise KeyboardInterrupt

    fails(tmp_path, config_for(paths), KeyboardInterrupt, None, progress=interrupt)


def test_a_second_merge_into_the_same_folder_loses(tmp_path):
    paths, _, _ = family(tmp_path / "in")

    def meanwhile(state):
        if state.tensors_done == 3:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "first.txt").write_text("the other merge was faster")

    with pytest.raises(OutputExists):
        merge_checkpoints(config_for(paths), tmp_path / "out", progress=meanwhile)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.txt"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, DeviceError, "device must be"),
        ({"device": "meta"}, DeviceError, "device must be"),
        ({"device": "cuda:99"}, DeviceError, "torch sees"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"shard_size": "big"}, ConfigError, "size such as"),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    paths, _, _ = family(tmp_path / "in")
    fails(tmp_path, config_for(paths), error, message, **options)
