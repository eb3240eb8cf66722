"""Models with modules in folders of their own: sentence-transformers, routers, pipelines of diffusers."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import digest, family
from safetensors.torch import load_file, save_file
from test_report_files import stop_after

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    MergeConfig,
    PickleRefusedError,
    QuantisedRefusedError,
    extract_lora,
    merge_checkpoints,
    verify_output,
)
from r_tsvm_kernels.checkpoint import Checkpoint
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.plan import make_plan

POOLING = '{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}'
DIFFUSION = "diffusion_pytorch_model.safetensors"
DENSE = (
    '{"in_features": 16, "out_features": 8, "bias": true, "activation_function": "torch.nn.modules.linear.Identity"}'
)


def listed(*modules):
    kind = "sentence_transformers.models."
    return json.dumps([{"idx": i, "path": path, "type": kind + name} for i, (path, name) in enumerate(modules)])


def write(folder, files):
    """Write files below a folder: text, or tensors as safetensors or pickle."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content)
        elif name.endswith(".bin"):
            torch.save(content, folder / name)
        else:
            save_file(content, folder / name)
    return folder


def sentence_model(seed, transformer="", dense="2_Dense/model.safetensors"):
    """Return the files of a transformer with pooling, a dense layer and normalisation, which has no folder."""
    generator = torch.Generator().manual_seed(seed)
    place = f"{transformer}/" if transformer else ""
    layers = {f"encoder.layer.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(3)}
    modules = (transformer, "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")
    return {
        "modules.json": listed(*modules),
        "config_sentence_transformers.json": "{}",
        f"{place}config.json": '{"model_type": "bert", "torch_dtype": "float32"}',
        f"{place}tokenizer.json": "{}",
        f"{place}sentence_bert_config.json": "{}",
        f"{place}model.safetensors": layers,
        "1_Pooling/config.json": POOLING,
        "2_Dense/config.json": DENSE,
        dense: {
            "linear.weight": torch.randn(8, 16, generator=generator),
            "linear.bias": torch.randn(8, generator=generator),
        },
    }


def config_for(base, *models, **fields):
    entries = tuple({"model": str(model)} for model in models)
    return MergeConfig(merge_method="task_arithmetic", base_model=str(base), models=entries, **fields)


def expected(files):
    """Return the sum of task vectors for every weight file of base and fine-tunes, as {file: {tensor: value}}."""
    base, *tuned = files
    return {
        file: {name: value + sum(other[file][name] - value for other in tuned) for name, value in tensors.items()}
        for file, tensors in base.items()
        if not isinstance(tensors, str)
    }


def assert_weights(out, wanted):
    """Check that the weight files of an output are those wanted, with their values and their own names."""
    assert {str(file.relative_to(out)) for file in out.rglob("*.safetensors")} == set(wanted)
    for file, tensors in wanted.items():
        found = load_file(out / file)
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_every_module_is_merged_and_written_back(tmp_path, transformer):
    files = [sentence_model(seed, transformer) for seed in range(3)]
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    out = tmp_path / "out"
    merge_checkpoints(config_for(*paths), out)
    assert_weights(out, expected(files))
    copied = {name: text for name, text in files[0].items() if isinstance(text, str)}
    assert {name: (out / name).read_text() for name in copied} == copied
    assert verify_output(out, inputs=True).ok
    # The transformer keeps the names that it has alone, so recipes and other layouts fit.
    tensors = make_plan(config_for(*paths), 10**9).tensors
    assert [name for name in tensors if not name.startswith("encoder.layer.")] == [
        "2_Dense/linear.bias",
        "2_Dense/linear.weight",
    ]


def test_both_layouts_merge_with_each_other(tmp_path):
    files = sentence_model(0), sentence_model(1, "0_Transformer"), sentence_model(2)
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    merge_checkpoints(config_for(*paths), tmp_path / "out")
    assert_weights(tmp_path / "out", expected([sentence_model(seed) for seed in range(3)]))


def test_only_transformers_are_divided_into_shards(tmp_path):
    """Other modules are loaded from model.safetensors alone."""
    files = [sentence_model(seed, "0_Transformer") for seed in range(2)]
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    out = tmp_path / "out"
    merge_checkpoints(config_for(*paths), out, shard_size=10)
    wanted = expected(files)
    layers = wanted.pop("0_Transformer/model.safetensors")
    index = json.loads((out / "0_Transformer" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in layers.values())
    wanted |= {f"0_Transformer/{file}": {name: layers[name]} for name, file in index["weight_map"].items()}
    assert len(wanted) == 4
    assert_weights(out, wanted)
    assert verify_output(out, inputs=True).ok
    assert Checkpoint(out).tensors.keys() == Checkpoint(paths[0]).tensors.keys()


def test_the_dtype_is_recorded_where_it_was(tmp_path):
    paths = [write(tmp_path / str(seed), sentence_model(seed)) for seed in range(2)]
    merge_checkpoints(config_for(*paths, out_dtype="bfloat16"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text()) == json.loads(DENSE)
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"].dtype == torch.bfloat16


def test_pickled_modules(tmp_path):
    files = [sentence_model(seed, dense="2_Dense/pytorch_model.bin") for seed in range(2)]
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    with pytest.raises(PickleRefusedError, match="0/2_Dense: only pickled weights"):
        merge_checkpoints(config_for(*paths), tmp_path / "out")
    merge_checkpoints(config_for(*paths), tmp_path / "out", allow_pickle=True)
    assert_weights(tmp_path / "out", expected([sentence_model(seed) for seed in range(2)]))


def test_a_resumed_merge_gives_the_same_bytes(tmp_path, monkeypatch):
    paths = [write(tmp_path / str(seed), sentence_model(seed)) for seed in range(2)]
    merge_checkpoints(config_for(*paths), tmp_path / "whole")
    stop_after(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config_for(*paths), tmp_path / "out", threads=1)
    monkeypatch.undo()
    assert merge_checkpoints(config_for(*paths), tmp_path / "out", resume=True).resumed == 4
    whole, resumed = digest(tmp_path / "whole"), digest(tmp_path / "out")
    differ = {"merge_journal.jsonl", "merge_report.json", "merge_report.html"}  # times, and order of the journal
    assert {name for name in whole.keys() | resumed.keys() if whole.get(name) != resumed.get(name)} <= differ


def test_a_router(tmp_path):
    """Its list of modules is a separate file beside its folders; not even the first folder has a config."""
    kind = "sentence_transformers.models."
    types = {"query_0_Static": f"{kind}StaticEmbedding", "document_0_Static": f"{kind}StaticEmbedding"}
    files = [
        {
            "modules.json": listed(("1_Router", "Router"), ("2_Normalize", "Normalize")),
            "1_Router/router_config.json": json.dumps({"types": types, "structure": {}, "parameters": {}}),
            **{f"1_Router/{name}/tokenizer.json": f'{{"{name}": 0}}' for name in types},
            **{f"1_Router/{x}/model.safetensors": {"weight": torch.randn(9, 4), "b": torch.randn(4)} for x in types},
        }
        for _ in range(2)
    ]  # fmt: skip
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    merge_checkpoints(config_for(*paths), tmp_path / "out", shard_size=10)
    assert_weights(tmp_path / "out", expected(files))
    copied = {name: text for name, text in files[0].items() if isinstance(text, str)}
    assert {name: (tmp_path / "out" / name).read_text() for name in copied} == copied


def test_a_pipeline_of_diffusers(tmp_path):
    """No component is the main one: each is named by its folder. A component without a folder is in the model's own."""
    parts = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"], "vae": [None, None]}
    parts |= {"scheduler": ["diffusers", "S"], "image_encoder": ["transformers", "absent"]}
    files = [
        {
            "model_index.json": json.dumps(parts),
            "unet/config.json": "{}",
            f"unet/{DIFFUSION}": {"mid.weight": torch.randn(4, 4)},
            "text_encoder/config.json": '{"torch_dtype": "float32"}',
            "text_encoder/model.safetensors": {"layer.weight": torch.randn(4, 4)},
            "scheduler/scheduler_config.json": "{}",
        }
        for _ in range(2)
    ]
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    write(paths[0], {"unet/diffusion_pytorch_model.fp16.safetensors": {"mid.weight": torch.zeros(4, 4)}})
    out = tmp_path / "out"
    merge_checkpoints(config_for(*paths), out)
    assert_weights(out, expected(files))
    assert {*files[0]} <= {str(file.relative_to(out)) for file in out.rglob("*")}
    assert make_plan(config_for(*paths), 10**9).tensors.keys() == {"unet/mid.weight", "text_encoder/layer.weight"}
    merge_checkpoints(config_for(*(path / "unet" for path in paths)), tmp_path / "unet")
    assert_weights(tmp_path / "unet", {DIFFUSION: expected(files)[f"unet/{DIFFUSION}"]})


@pytest.mark.parametrize(
    "folder", ["../x", "/etc", "a/../../x", ".", "a//b", "a\\b", "C:", "a\nb", "x.safetensors", "\ud800", "x" * 300]
)
def test_a_list_that_leads_elsewhere(tmp_path, folder):
    write(tmp_path / "x", {"config.json": "{}"})
    files = sentence_model(0) | {"modules.json": listed(("", "Transformer"), (folder, "Dense"))}
    with pytest.raises(CheckpointError, match=r"modules\.json: .* is not a folder inside this one"):
        Checkpoint(write(tmp_path / "model", files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a JSON list, got dict"),
        ("[", "not readable as JSON"),
        ("[1]", "expected a list of modules, each with a path and a type; got 1"),
        ('[{"path": 0, "type": "x"}]', "expected a list of modules"),
        ('[{"path": "1_Pooling"}]', "expected a list of modules"),
        ("[" * 100_000, "nested too deeply"),
        (listed(("", "Router")), "config.json: expected the types of the router's modules"),
        (listed(("4_Dense", "Dense")), "names the folder 4_Dense, which is missing; the download may be incomplete"),
    ],
)
def test_a_list_that_is_damaged(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write(tmp_path / "model", sentence_model(0) | {"modules.json": content}))


@pytest.mark.parametrize("name", ["modules.json", "model_index.json"])
def test_a_list_that_is_gone(tmp_path, name):
    """A link into a download cache that was cleaned."""
    model = write(tmp_path / "model", {"model.safetensors": {"w.weight": torch.eye(4)}})
    (model / name).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"{name}: not readable as JSON: .*No such file"):
        Checkpoint(model)


def test_a_router_that_leads_elsewhere(tmp_path):
    config = json.dumps({"types": {"../x": "a.Dense"}})
    files = sentence_model(0) | {"modules.json": listed(("", "Router")), "router_config.json": config}
    with pytest.raises(CheckpointError, match=r"router_config\.json: '\.\./x' is not a folder"):
        Checkpoint(write(tmp_path / "model", files))


def test_a_model_without_the_base_s_modules(tmp_path):
    base, tuned = (write(tmp_path / str(seed), sentence_model(seed)) for seed in range(2))
    (tuned / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 missing \(2_Dense/linear\.bias, 2_Dense/linear\.weight\)"):
        make_plan(config_for(base, tuned), 10**9)


def test_one_file_holds_one_module(tmp_path):
    base, tuned = (write(tmp_path / str(seed), sentence_model(seed, "0_Transformer")) for seed in range(2))
    with pytest.raises(ConfigError, match=r"modules of its own in folders \(0_Transformer, 2_Dense\); choose a folder"):
        merge_checkpoints(config_for(base, tuned), tmp_path / "out.safetensors")
    for path in (base, tuned):
        (path / "2_Dense" / "model.safetensors").unlink()
    merge_checkpoints(config_for(base, tuned), tmp_path / "out.safetensors")
    assert len(load_file(tmp_path / "out.safetensors")) == 3
    assert verify_output(tmp_path / "out.safetensors", inputs=True).ok


def test_adapters_belong_to_the_main_module(tmp_path):
    base, tuned = (write(tmp_path / str(seed), sentence_model(seed)) for seed in range(2))
    result = extract_lora(str(base), str(tuned), tmp_path / "adapter", rank=4)
    assert {*result.modules} == {f"encoder.layer.{i}" for i in range(3)}
    assert "beside the one that an adapter belongs to" in result.left_out["2_Dense/linear.weight"].reason


def test_inspect_names_the_files(tmp_path, capsys):
    paths = [write(tmp_path / str(seed), sentence_model(seed)) for seed in range(2)]
    arguments = ["--base", str(paths[0]), "--model", str(paths[1]), "--method", "task_arithmetic", "--json"]
    assert main(["inspect", *arguments]) == 0
    assert {*json.loads(capsys.readouterr().out)["shards"]} == {"model.safetensors", "2_Dense/model.safetensors"}


def test_a_plain_model_has_one_module(tmp_path):
    paths, base, _ = family(tmp_path)
    checkpoint = Checkpoint(paths[0])
    assert (checkpoint.folders, checkpoint.main) == (("",), Path(paths[0]))
    assert [(module.folder, module.prefix) for module in checkpoint.modules] == [("", "")]
    assert checkpoint.tensors.keys() == base.keys()


def test_a_quantised_module(tmp_path):
    files = sentence_model(0) | {"2_Dense/config.json": '{"quantization_config": {"quant_method": "x"}}'}
    with pytest.raises(QuantisedRefusedError, match=r"model/2_Dense: .* config\.json has quantization_config"):
        Checkpoint(write(tmp_path / "model", files))


def test_a_weight_file_without_tensors(tmp_path):
    files = [sentence_model(seed) | {"1_Pooling/model.safetensors": {}} for seed in range(2)]
    paths = [write(tmp_path / str(i), content) for i, content in enumerate(files)]
    merge_checkpoints(config_for(*paths), tmp_path / "out")
    assert_weights(tmp_path / "out", expected(files))


@pytest.mark.parametrize(
    ("file", "content", "library"),
    [
        ("config.json", '{"model_type": "llama"}', "transformers"),
        ("config.json", '{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}', "diffusers"),
        ("model_index.json", '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}', "diffusers"),
        ("modules.json", listed(("", "Transformer")), "sentence-transformers"),
        ("config.json", '{"hidden": 4}', None),
    ],
)
def test_the_card_names_the_library_that_loads_it(tmp_path, file, content, library):
    files = {"model.safetensors": {"w.weight": torch.eye(4)}, file: content}
    paths = [write(tmp_path / str(i), files) for i in range(2)]
    merge_checkpoints(config_for(*paths), tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front.get("library_name") == library
