"""Forms of recipes as people publish them, adapters, dtypes and rare values, in mergekit and in our runner."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
peft = pytest.importorskip("peft", reason="mergekit needs it")

from mergekit_pair import (  # noqa: E402  after the check for mergekit
    assert_close,
    assert_same_config,
    both,
    by_mergekit,
    by_us,
    fine_tune,
    llama,
    weights,
)

from r_tsvm_kernels import MergeConfig, merge_tensors  # noqa: E402
from r_tsvm_kernels.cli import main  # noqa: E402
from r_tsvm_kernels.integrations import mergekit as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with three fine-tunes and an adapter, in float32 and (names with h) bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    for mark, dtype in (("", torch.float32), ("h", torch.bfloat16)):
        base = llama(folder / f"{mark}base", 96, dtype=dtype)
        for seed, name in enumerate("abc"):
            fine_tune(base, folder / f"{mark}{name}", seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(folder / f"{mark}lora")
    return folder


@pytest.fixture(autouse=True)
def in_their_folder(models, monkeypatch):
    monkeypatch.chdir(models)  # relative names, as in recipes of the hub


def compared(recipe, tmp_path, tolerance=2e-6):
    theirs, ours = both(recipe, tmp_path)
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name, tolerance)
    assert_same_config(tmp_path)
    return theirs, ours


def arithmetic(*models, base="base", **more):
    return {
        "merge_method": "task_arithmetic", "base_model": base, "models": [{"model": model} for model in models],
        "parameters": {"weight": 0.5}, "dtype": "float32", **more,
    }  # fmt: skip


REFERENCES = {
    "mapping": arithmetic({"model": {"path": "a"}}, "b", base={"model": {"path": "base"}}),
    "without a revision": arithmetic({"model": {"path": "a", "revision": None}, "lora": None}),
    "adapter of the base": arithmetic("base+lora", "a"),
    "adapter as a mapping": arithmetic({"model": {"path": "base"}, "lora": {"path": "lora"}}, "a"),
    "adapter of a fine-tune": arithmetic("a+lora", "b"),
    "adapted base": arithmetic("a", "b", base="base+lora"),
    "copy of an adapted model": {"merge_method": "passthrough", "models": [{"model": "a+lora"}], "dtype": "float32"},
    "in bfloat16": {"merge_method": "passthrough", "models": [{"model": "ha+hlora"}], "dtype": "bfloat16"},
    "slices": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a+lora", "layer_range": [0, 3]}]},
                   {"sources": [{"model": "b", "layer_range": [1, 4]}]}],
        "dtype": "float32",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_references(tmp_path, case):
    compared(REFERENCES[case], tmp_path)


def test_an_adapted_model_is_not_rounded(tmp_path):
    """mergekit applies an adapter in the dtype of its model, so the sum is rounded to bfloat16 before the merge."""
    recipe = arithmetic("ha+hlora", base="hbase", parameters={"weight": 1.0})
    theirs, ours = both(recipe, tmp_path)
    rounded = 0
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name, 3e-3)
        rounded += not torch.equal(tensor.bfloat16().float(), tensor)
        assert torch.equal(theirs[name].bfloat16().float(), theirs[name])
    assert rounded == 8  # the matrices that the adapter changes


VALUES = {
    "text": arithmetic(parameters={"weight": "5e-1", "normalize": "true", "lambda": "0.7"}),
    "first filter": arithmetic(
        parameters={"weight": [{"filter": "q_proj", "value": 0.9}, {"filter": "*", "value": 0.3}]}
    ),
    "gradients": arithmetic(parameters={"weight": {"filter": "*", "value": [0.9, 0.1]}, "lambda": [0.2, 1.1]}),
    "negative": arithmetic(parameters={"weight": [{"filter": "mlp", "value": -0.4}, {"value": 1.5}]}),
    "zero in some layers": arithmetic(parameters={"weight": [0, 0.5, 1], "normalize": True}),
    "zero for some tensors": arithmetic(
        parameters={"weight": [{"filter": "mlp", "value": 0}, {"value": 0.4}], "normalize": True}
    ),
    "bools over the layers": arithmetic(parameters={"weight": 0.7, "normalize": [True, False]}),
    "bools by filters": arithmetic(
        parameters={"weight": 0.7, "normalize": [{"filter": "mlp", "value": True}, {"value": False}]}
    ),
    "of other methods": arithmetic(parameters={"weight": 0.7, "density": 0.3, "int8_mask": True, "t": 0.5}),
    "nothing": arithmetic(parameters={"weight": 0.7}, tokenizer_source=None, slices=None, out_dtype=None),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path, case):
    listed = [{"model": "a"}, {"model": "b", "parameters": None}, {"model": "c", "parameters": {}}]
    compared({**VALUES[case], "models": listed}, tmp_path)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_linear", "della_linear", "della", "breadcrumbs"])
def test_layers_without_weight_stay_the_base(tmp_path, method):
    recipe = arithmetic("a", "b", parameters={"weight": [0, 1], "normalize": True, "density": 1.0})
    _, ours = compared({**recipe, "merge_method": method}, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ours[name], weights("base")[name])


def test_a_model_without_a_value_falls_back(tmp_path):
    recipe = arithmetic(parameters={"weight": 0.6, "density": 0.75}, merge_method="ties")
    own = {"weight": [{"filter": "mlp", "value": 0.9}], "density": {"filter": "q_proj", "value": 0.25}}
    recipe["models"] = [{"model": "a", "parameters": own}, {"model": "b", "parameters": {"weight": [0.1, 0.9]}}]
    compared(recipe, tmp_path)


DTYPES = [None, "float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype, out_dtype", [*itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("names", [("hbase", "ha", "hb"), ("base", "ha", "b")], ids=",".join)
def test_dtypes(tmp_path, dtype, out_dtype, names):
    """The same dtypes of tensors and in the configuration; values within the rounding of the coarsest."""
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    recipe = {"merge_method": "linear", "base_model": names[0], "models": listed}
    recipe |= {key: value for key, value in (("dtype", dtype), ("out_dtype", out_dtype)) if value}
    compared(recipe, tmp_path, 4e-3)


NEAREST = {
    "task_arithmetic": {"lambda": 0.7}, "multislerp": {}, "karcher": {"tol": 1e-7}, "ram": {}, "ramplus_tl": {},
    "model_stock": {}, "nuslerp": {},
}  # fmt: skip


@pytest.mark.parametrize("method", NEAREST)
def test_bfloat16_is_rounded_once(tmp_path, method):
    """Fine-tunes in bfloat16 give what mergekit gives when it computes in float32 and rounds the result."""
    own = {} if method in ("karcher", "model_stock") else {"parameters": {"weight": 0.7}}
    names = ["ha", "hb"] if method == "nuslerp" else ["ha", "hb", "hc"]
    recipe = {
        "merge_method": method, "base_model": "hbase", "models": [{"model": name, **own} for name in names],
        "parameters": NEAREST[method] | ({"weight": 0.7} if method == "karcher" else {}),
    }  # fmt: skip
    theirs = by_mergekit({**recipe, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path / "theirs")
    ours = by_us({**recipe, "dtype": "bfloat16"}, tmp_path / "ours")
    differ = 0
    for name, tensor in ours.items():
        assert ((tensor.float() - theirs[name].float()).abs() <= 2**-7 * theirs[name].float().abs()).all(), name
        differ += int((tensor != theirs[name]).sum())
    # Means of two are often half way between two values of bfloat16, and the last bit of float32 decides.
    assert differ <= 1e-2 * sum(tensor.numel() for tensor in ours.values())


@pytest.mark.parametrize("holder", ["base", "a"])
def test_tables_that_models_compute_anew(models, tmp_path, holder):
    """mergekit leaves them out; here the output has those of the base, and no model needs them."""
    folder = tmp_path / "with_tables"
    shutil.copytree(models / holder, folder)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) for i in range(4)}
    save_file(weights(folder) | tables, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = arithmetic(
        *(["a"] if holder == "base" else [str(folder)]), base=str(folder) if holder == "base" else "base"
    )
    theirs, ours = by_mergekit(recipe, tmp_path / "theirs"), by_us(recipe, tmp_path / "ours")
    assert ours.keys() - theirs.keys() == (tables.keys() if holder == "base" else set())
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, name)


def test_a_chain_of_documents(models, tmp_path):
    from mergekit.scripts.multimerge import main as multi

    def place(name, first, last):
        return {"sources": [{"model": name, "layer_range": [first, last]}]}

    one, two = (str(models / name) for name in "ab")
    documents = [
        {"name": "deep", "merge_method": "passthrough", "slices": [place(one, 0, 3), place(two, 2, 4)]},
        {"name": "deeper", "merge_method": "passthrough", "slices": [place("deep", 0, 5), place("deep", 3, 5)]},
        {
            "merge_method": "linear",
            "models": [{"model": "deeper", "parameters": {"weight": 1}}],
            "out_dtype": "float16",
        },
    ]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("\n---\n".join(map(json.dumps, documents)))
    integration.uninstall()
    with pytest.raises(SystemExit) as end:
        multi.main(
            [str(recipe), "-I", str(tmp_path / "steps"), "--out-path", str(tmp_path / "theirs"), "--no-cuda", "--quiet"]
        )
    assert end.value.code == 0
    assert main(["merge", str(recipe), str(tmp_path / "ours"), "--device=cpu", "--quiet"]) == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name)
    assert_same_config(tmp_path)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
@pytest.mark.parametrize("density, epsilon", [(0.5, 0.1), (0.7, 0.2), (0.3, 0.2)])
def test_random_masks_keep_as_many_of_each_magnitude(method, density, epsilon):
    """The masks differ, their distribution does not: shares kept of ten groups of magnitudes in each row."""
    from mergekit.merge_methods import merge_tensors as theirs

    integration.uninstall()
    own = {"epsilon": epsilon} if method == "della_linear" else {}
    update = torch.randn(1000, 400, generator=torch.Generator().manual_seed(7))
    group = 10 * update.abs().argsort(1).argsort(1) // 400
    torch.manual_seed(1)
    shared = {"rescale": False, "normalize": False, **own}
    parameters = {"density": [density], "weight": [1.0], **shared}
    found = [
        theirs([torch.zeros_like(update), update], method, parameters=parameters, base_index=0),
        merge_tensors(torch.zeros_like(update), [update], MergeConfig(method, density=density, **shared)).weight,
    ]
    for index in range(10):
        first, second = (float((kept != 0)[group == index].float().mean()) for kept in found)
        assert abs(first - second) < 0.015  # 6 standard deviations of 40,000 elements
    for kept in found:
        assert torch.equal(kept[kept != 0], update[kept != 0])
