import json
import os
from dataclasses import replace
from importlib import import_module

import oracle
import pytest
import torch
from checkpoints import digest, family, save, state_dict, tuned_state_dict
from compare import relative_error, same_bits
from merging import tasks_of
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    DeviceError,
    MemoryBudgetError,
    MergeConfig,
    NonFiniteError,
    OutputExistsError,
    merge_checkpoints,
    merge_state_dicts,
    use_backend,
    verify_output,
)
from r_tsvm_kernels.engine import make_schedule, run, smallest_schedule
from r_tsvm_kernels.engine.journal import read_journal
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.plan import make_plan


def config_for(paths, method="rtsvm", **fields):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned), **fields)


def load(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_as_merging_the_state_dicts(tmp_path, method, dtype):
    paths, base, tuned = family(tmp_path / "in", tasks=tasks_of(method, 3), dtype=dtype)
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
        "LICENSE.txt", "README.md", "config.json", "generation_config.json", "merge_journal.jsonl", "merge_recipe.yaml",
        "merge_report.html", "merge_report.json", "model.safetensors.index.json", "modeling_toy.py", "tokenizer.json",
    ]  # fmt: skip
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert MergeConfig.from_yaml(tmp_path / "out" / "merge_recipe.yaml").merge_method == "rtsvm"
    report = json.loads(result.report_path.read_text())
    assert report["tensors"]["model.layers.0.attn.weight"]["ranks"]
    assert report["tensors"]["model.layers.0.attn.weight"]["certificate"]["route"] == "svd-float64"
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
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        "out.merge_journal.jsonl", "out.merge_report.html", "out.merge_report.json", "out.safetensors",
    ]  # fmt: skip


def test_progress_counts_tensors_and_bytes(tmp_path):
    paths, base, _ = family(tmp_path / "in")
    seen = []
    merge_checkpoints(config_for(paths), tmp_path / "out", progress=seen.append)
    assert [state.tensors_done for state in seen] == list(range(1, len(base) + 1))
    assert {state.tensors_total for state in seen} == {len(base)}
    assert seen[-1].bytes_done == seen[-1].bytes_total > 0
    assert {state.tensor for state in seen} == base.keys()


def test_the_result_does_not_depend_on_threads_or_memory(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    before, results = torch.get_num_threads(), []
    for name, options in {
        "one": {"threads": 1}, "two": {"threads": 2}, "three": {"threads": 3},
        "small": {"threads": 3, "memory": smallest_schedule(make_plan(config_for(paths), 3000)).peak_host_bytes},
    }.items():  # fmt: skip
        merge_checkpoints(config_for(paths), tmp_path / name, shard_size=3000, **options)
        results.append({file: hash for file, hash in digest(tmp_path / name).items() if "safetensors" in file})
        assert torch.get_num_threads() == before
    assert len(results[0]) > 2 and all(result == results[0] for result in results)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("limits", [{}, {"read_bytes": 1, "work_bytes": 1}], ids=["roomy", "one-at-a-time"])
def test_tiles_join_to_the_same_bytes(tmp_path, monkeypatch, method, threads, limits):
    paths, base, tuned = family(tmp_path / "in", tasks=tasks_of(method, 3), dtype=torch.bfloat16)
    monkeypatch.setattr(import_module("r_tsvm_kernels.engine.scheduling"), "TILE_ELEMENTS", (40, 20))
    monkeypatch.setattr(run, "make_schedule", lambda *args, **kwargs: replace(make_schedule(*args, **kwargs), **limits))
    seen = []
    result = merge_checkpoints(config_for(paths, method), tmp_path / "out", threads=threads, progress=seen.append)
    merged = load(tmp_path / "out")
    expected = merge_state_dicts(base, tuned, config_for(paths, method))
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.state_dict.items())
    assert len(seen) == len(base)
    for name, report in expected.reports.items():
        got = result.reports[name]
        if got.reason.startswith("copied"):  # no engine copies in memory
            continue
        assert (got.shape, got.treatment, got.reason, got.weights, got.ranks, got.certificate) == (
            report.shape, report.treatment, report.reason, report.weights, report.ranks, report.certificate,
        )  # fmt: skip
    assert verify_output(tmp_path / "out", inputs=True).ok


def test_decompositions_do_not_depend_on_the_threads_of_the_caller(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = [
        save(tmp_path / name, {f"w{i}": torch.randn(300, 260, generator=generator) for i in range(4)}) for name in "abc"
    ]
    before = torch.get_num_threads()
    try:
        for caller, threads in ((1, 1), (4, 1), (4, 2), (1, 3)):
            torch.set_num_threads(caller)
            merge_checkpoints(config_for(paths), tmp_path / f"{caller}{threads}", threads=threads)
            assert torch.get_num_threads() == caller
    finally:
        torch.set_num_threads(before)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("11", "41", "42", "13")]
    assert all(file == files[0] for file in files)


def test_forced_backends_hold_in_the_threads_that_merge(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    journals = []
    for name, choice in {"cpu": {}, "torch": {"elect_and_sum": "torch"}}.items():
        with use_backend(**choice):
            merge_checkpoints(config_for(paths, "linear"), tmp_path / name)
        journals.append(read_journal(tmp_path / name / "merge_journal.jsonl")[0]["kernels"]["elect_and_sum"])
    assert journals[1] == "torch"
    with use_backend(elect_and_sum="cuda"), pytest.raises(BackendUnavailableError):
        merge_checkpoints(config_for(paths, "linear"), tmp_path / "out")


def test_a_tensor_that_is_kept_is_copied_bit_for_bit(tmp_path):
    values = torch.tensor([0x7F81, 0xFFC1, 0x8000, 0x0001], dtype=torch.uint16).view(torch.bfloat16)  # NaN payloads
    models = [save(tmp_path / name, {"odd": values, "w": torch.ones(2, 2)}) for name in "abc"]
    merge_checkpoints(config_for(models, "task_arithmetic", exclude=("odd",)), tmp_path / "out")
    assert same_bits(load(tmp_path / "out")["odd"], values)


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
    with pytest.raises(CheckpointError, match=r"m1: lm_head\.weight should be .* the base ties them"):
        merge_checkpoints(config_for(paths), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# --- failures: a clear error, no output, no leftovers, inputs untouched; those that leave something: test_resume.py -


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
    before = digest(tmp_path / "in")
    message = rf"model\.layers\.1\.mlp\.weight of {owner}: 1 of 512.*tensors are finished: run again with --resume"
    with pytest.raises(NonFiniteError, match=message):
        merge_checkpoints(config_for(paths), tmp_path / "out", threads=1)
    assert digest(tmp_path / "in") == before
    assert not (tmp_path / "out").exists()


def test_an_output_in_use(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    fails(tmp_path, config_for(paths), OutputExistsError, "already in use")
    fails(tmp_path, config_for(paths), OutputExistsError, "already in use", out="out/thesis.txt")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    fails(tmp_path, config_for(paths), OutputExistsError, "already in use", out="link")
    (tmp_path / "dir.safetensors").mkdir()
    fails(tmp_path, config_for(paths), OutputExistsError, "a folder", out="dir.safetensors")


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, DeviceError, "device must be"),
        ({"device": "meta"}, DeviceError, "device must be"),
        ({"device": "cuda:99"}, DeviceError, "torch sees"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"threads": 1.5}, ConfigError, r"threads must be a whole number, got 1\.5"),
        ({"threads": "2"}, ConfigError, "threads must be a whole number, got '2'"),
        ({"shard_size": "big"}, ConfigError, "size such as"),
        ({"memory": "1MB"}, MemoryBudgetError, "memory budget of at least"),
        ({"resume": True, "restart": True}, ConfigError, "choose one"),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    paths, _, _ = family(tmp_path / "in")
    fails(tmp_path, config_for(paths), error, message, **options)
