"""Slices, passthrough and modules: the same recipe in mergekit without our backend and in our runner, same weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.integrations import mergekit as integration

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers

OUT_PROJECTIONS = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def variants(folder, model, names="abc"):
    """Write a model and random variants of it."""
    model.save_pretrained(folder / "base")
    base = weights(folder / "base")
    shared = {key: 0.1 * torch.randn_like(t) for key, t in base.items()}  # model_stock wants angles below 90 degrees
    for name in names:
        shutil.copytree(folder / "base", folder / name)
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        tuned = {key: t + shared[key] + 0.1 * torch.randn_like(t) for key, t in base.items()}
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return variants(tmp_path_factory.mktemp("llama"), transformers.LlamaForCausalLM(config))


def by_mergekit(recipe, out):
    """Run mergekit on its own arithmetic."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    integration.uninstall()
    options = MergeOptions(cuda=False, copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    return weights(out)


def by_us(recipe, out):
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))  # JSON is YAML
    assert main(["merge", str(file), str(out), "--device=cpu", "--quiet"]) == 0
    assert main(["verify", "--inputs", str(out)]) == 0
    return weights(out)


def compared(recipe, tmp_path, *, exact=False):
    """Merge with both; the same tensors, to the bit or up to rounding, and as many layers in the configuration."""
    theirs, ours = by_mergekit(json.loads(json.dumps(recipe)), tmp_path / "theirs"), by_us(recipe, tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert (tensor - theirs[name]).norm() <= 2e-6 * theirs[name].norm(), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0].get("num_hidden_layers") == configs[1].get("num_hidden_layers")
    return ours, configs[1]


def source(models, name, first, last, **parameters):
    found = {"model": str(models / name), "layer_range": [first, last]}
    return {**found, **({"parameters": parameters} if parameters else {})}


@pytest.mark.parametrize(
    "ranges",
    [
        [("a", 0, 4), ("b", 1, 5)],  # overlapping
        [("a", 0, 3), ("a", 2, 5)],  # one model, some layers twice
        [("a", 0, 1), ("b", 0, 1), ("a", 1, 2), ("c", 4, 5)],  # single layers
        [("a", 2, 4)],  # fewer layers
        [("a", 0, 5)],
        [("b", 3, 5), ("a", 0, 2)],  # later layers first
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [None, "base"])
def test_passthrough(models, tmp_path, ranges, base):
    slices = [{"sources": [source(models, *span)]} for span in ranges]
    recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    if base:
        recipe["base_model"] = str(models / base)
    _, config = compared(recipe, tmp_path, exact=True)
    assert config["num_hidden_layers"] == sum(last - first for _, first, last in ranges)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_depth_upscaling_with_scales(models, tmp_path, dtype):
    slices = [
        {"sources": [source(models, "a", 0, 3)]},
        {"sources": [source(models, "a", 2, 3, scale=OUT_PROJECTIONS)]},
        {"sources": [source(models, "a", 3, 5)], "parameters": {"scale": [1.0, 0.5]}},
    ]
    compared({"merge_method": "passthrough", "slices": slices, "dtype": dtype}, tmp_path, exact=True)


METHODS = {
    "linear": {"weight": 0.7},
    "task_arithmetic": {"weight": 0.5, "lambda": 0.8},
    "ties": {"weight": 0.5, "density": 1.0},
    "slerp": {"t": 0.4},
    "multislerp": {"weight": 0.5},
    "karcher": {"max_iter": 30, "tol": 1e-7},
    "model_stock": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_slices_of_several_models(models, tmp_path, method):
    two = method == "slerp"
    names = ["base", "a"] if two else ["base", "a", "b"]
    key = "t" if two else "weight" if "weight" in METHODS[method] else None
    own = {key: [0.2, 0.9, 0.4]} if key else {}
    slices = [
        {"sources": [source(models, name, 0, 1) for name in names]},
        {"sources": [source(models, name, 0, 3) for name in names], "parameters": own},
        {
            "sources": [source(models, name, 1, 4, **({} if two or not key else {key: 0.3})) for name in names],
            "parameters": {key: [{"filter": "mlp", "value": [0.1, 0.6]}]} if key else {},
        },
    ]
    recipe = {"merge_method": method, "base_model": str(models / "base"), "slices": slices, "dtype": "float32"}
    compared({**recipe, "parameters": METHODS[method]}, tmp_path)


def test_a_slice_of_the_base_alone_copies_it(models, tmp_path):
    slices = [
        {"sources": [source(models, "base", 0, 2)]},
        {"sources": [source(models, "base", 2, 4), source(models, "b", 2, 4)]},
        {"sources": [source(models, "base", 4, 5)]},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "slices": slices}
    ours, _ = compared({**recipe, "parameters": {"weight": 0.4}, "dtype": "float32"}, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(ours[name], weights(models / "base")[name])


def test_sources_of_other_layers_than_the_base(models, tmp_path):
    slices = [
        {"sources": [source(models, "base", 0, 2), source(models, "a", 1, 3), source(models, "b", 3, 5)]},
        {"sources": [source(models, "base", 2, 5), source(models, "a", 2, 5), source(models, "b", 0, 3)]},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "slices": slices}
    compared({**recipe, "parameters": {"weight": [0.4, 0.1]}, "dtype": "float32"}, tmp_path)


def test_a_model_without_slices(models, tmp_path):
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models / "a")}], "dtype": "bfloat16"}
    compared(recipe, tmp_path, exact=True)


@pytest.fixture(scope="module")
def encoder_decoders(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return variants(tmp_path_factory.mktemp("t5"), transformers.T5ForConditionalGeneration(config))


def test_modules_of_an_encoder_decoder(encoder_decoders, tmp_path):
    models = encoder_decoders

    def listed(names, **parameters):
        return {"models": [{"model": str(models / name)} for name in names], "parameters": parameters}

    modules = {"encoder": listed("ab", weight=0.3), "decoder": listed("bc"), "shared": listed("ac", weight=0.9)}
    recipe = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "modules": modules}
    compared({**recipe, "parameters": {"weight": 0.5}, "dtype": "float32"}, tmp_path)


def test_several_documents(models, tmp_path):
    from mergekit.scripts.multimerge import main as multi

    halves = [{"sources": [source(models, "a", 0, 3)]}, {"sources": [source(models, "b", 2, 5)]}]
    means = [{"model": str(models / name), "parameters": {"weight": 1}} for name in ("a", "b")]
    documents = [
        {"name": "deep", "merge_method": "passthrough", "slices": halves, "dtype": "float32"},
        {"name": "mean", "merge_method": "linear", "models": means, "dtype": "float32"},
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [source(models, "a", 0, 1) | {"model": "deep", "layer_range": [1, 6]}]},
                       {"sources": [source(models, "a", 0, 1) | {"model": "mean", "layer_range": [4, 5]}]}],
        },
    ]  # fmt: skip
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("\n---\n".join(map(json.dumps, documents)))
    integration.uninstall()
    arguments = [str(recipe), "-I", str(tmp_path / "steps"), "--out-path", str(tmp_path / "theirs")]
    with pytest.raises(SystemExit) as end:
        multi.main([*arguments, "--no-cuda", "--no-copy-tokenizer", "--quiet"])
    assert end.value.code == 0
    assert main(["merge", str(recipe), str(tmp_path / "ours"), "--device=cpu", "--quiet"]) == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 2e-6 * theirs[name].norm(), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_hidden_layers"] == 6
