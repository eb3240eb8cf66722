"""Merges from parts as an algorithm of FusionBench. `make test-integrations` runs these tests."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from compare import same_bits
from safetensors.torch import load_file
from torch import nn

from r_tsvm_kernels import MergeConfig, Parts, ShapeError, decompose_checkpoints, merge_checkpoints
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import CheckpointError, ConfigError, ConvergenceError
from r_tsvm_kernels.integrations import fusion_bench as integration

# Once FusionBench is imported, which another file may do first, find_spec() fails: it replaces its own module.
pytest.importorskip("fusion_bench", reason="FusionBench is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # FusionBench and lightning warn about many things of their own
TASKS = ("math", "code", "chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with tied embeddings, three fine-tunes and their parts, and configurations of pools of them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: run make test-integrations")
    out = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(("base", *TASKS)):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(out / name)
    decompose_checkpoints(recipe(out), out / "parts")
    (out / "conf" / "modelpool").mkdir(parents=True)
    for name, lazy in (("eager", False), ("lazy", True)):
        config = {
            "_target_": "fusion_bench.modelpool.CausalLMPool",
            "models": {"_pretrained_": str(out / "base")},
            "tokenizer": None,
            "model_kwargs": {"torch_dtype": "float32"},
            "enable_lazy_loading": lazy,
        }
        (out / "conf" / "modelpool" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return out


def recipe(folder, **options):
    models = [folder / name for name in TASKS]
    return MergeConfig("tsvm", base_model=folder / "base", models=models, alpha=0.8, **options)


def pool_of(folder, **options):
    from fusion_bench.modelpool import CausalLMPool

    return CausalLMPool({"_pretrained_": str(folder / "base")}, tokenizer=None, **options)


def algorithm(folder, weights=None, **options):
    return integration.PartsAlgorithm(str(folder / "parts"), weights=weights, **options)


@pytest.mark.parametrize("lazy", [False, True])
def test_the_model_has_the_bytes_of_the_merge(folder, tmp_path, lazy):
    """Also that of many weights, one after the other, and of gradients."""
    pool, parts = pool_of(folder, enable_lazy_loading=lazy), Parts.load(folder / "parts")
    asked = [(None, None), ({"math": 0.3, "chat": -1.0}, 1.1), ([0.0, 1.0, [0.5, 1.5]], None), (None, None)]
    for number, (weights, alpha) in enumerate(asked):
        model = algorithm(folder, weights, alpha=alpha).run(pool)
        merge_checkpoints(parts.recipe(weights, alpha), tmp_path / f"out{number}")
        expected = load_file(tmp_path / f"out{number}" / "model.safetensors")
        found = model.state_dict()
        assert found.keys() - expected.keys() == {"lm_head.weight"}
        assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            assert model.eval()(torch.arange(8)[None]).logits.isfinite().all()
    assert integration.calls()["parts"] >= len(asked)


def test_it_agrees_with_the_merge_of_the_pool(folder):
    """Without parts, FusionBench merges anew for every weight."""
    from fusion_bench.modelpool import CausalLMPool

    models = {"_pretrained_": str(folder / "base"), **{name: str(folder / name) for name in TASKS}}
    pool = CausalLMPool(models, tokenizer=None, model_kwargs={"torch_dtype": "float32"})
    direct = integration.MergeAlgorithm("tsvm", {"alpha": 0.7}, {"code": {"weight": -0.4}}).run(pool).state_dict()
    found = algorithm(folder, {"code": -0.4}, alpha=0.7).run(pool).state_dict()
    for name, tensor in direct.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_pool_of_modules_keeps_its_own(folder):
    pretrained = pool_of(folder).load_pretrained_model()
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    merged = algorithm(folder, {"math": 2.0}).run({"_pretrained_": pretrained})
    assert all(torch.equal(tensor, before[name]) for name, tensor in pretrained.state_dict().items())
    assert not torch.equal(merged.model.norm.weight, pretrained.model.norm.weight)


def test_what_the_base_lacks_keeps_the_pools_values(folder):
    pretrained = pool_of(folder).load_pretrained_model()
    pretrained.classifier = nn.Linear(32, 3)
    merged = algorithm(folder).run({"_pretrained_": pretrained})
    assert torch.equal(merged.classifier.weight, pretrained.classifier.weight)


@pytest.mark.parametrize("lazy", [False, True])
def test_the_dtype_is_the_pools(folder, lazy):
    pool = pool_of(folder, enable_lazy_loading=lazy, model_kwargs={"torch_dtype": "bfloat16"})
    merged, expected = (
        algorithm(folder, {"math": 0.5}).run(pool),
        Parts.load(folder / "parts").state_dict({"math": 0.5}),
    )
    assert {tensor.dtype for tensor in merged.parameters()} == {torch.bfloat16}
    assert all(torch.equal(merged.state_dict()[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_rank_and_another_place_of_the_base(folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder / "base")
    found = algorithm(folder, rank=2, base=str(tmp_path / "moved")).run(pool_of(folder)).state_dict()
    expected = Parts.load(folder / "parts", rank=2).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole = Parts.load(folder / "parts").state_dict()
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"])


def test_hyper_parameters_serialise(folder, tmp_path):
    from fusion_bench import BaseAlgorithm

    first = algorithm(folder, {"math": 0.4, "code": [0.1, 0.9]}, alpha=1.2)
    first.to_yaml(tmp_path / "method.yaml")
    again = BaseAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert type(again) is integration.PartsAlgorithm and again.config == first.config
    one, two = (found.run(pool_of(folder)).state_dict() for found in (first, again))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"weights": {"maths": 1.0}}, ConfigError, "maths"),
        ({"weights": [1.0]}, ConfigError, "one for each of math, code, chat"),
        ({"weights": {"math": "much"}}, ConfigError, "number"),
        ({"alpha": float("inf")}, ConfigError, "finite"),
        ({"rank": 0}, ConfigError, "rank"),
        ({"base": "nowhere"}, (CheckpointError, ConfigError), "nowhere"),
        ({"lambda": 0.5}, ConfigError, "unknown key 'lambda'"),
    ],
)
def test_mistakes_are_errors_before_any_model_is_loaded(folder, monkeypatch, options, error, words):
    monkeypatch.setattr("fusion_bench.BaseModelPool.load_pretrained_model", None)
    with pytest.raises(error, match=words):
        algorithm(folder, **options).run(pool_of(folder))


def test_folders_and_pools_that_do_not_fit(folder):
    with pytest.raises(ConfigError, match=r"method\.parts=PATH"):
        integration.PartsAlgorithm()
    with pytest.raises(CheckpointError, match=r"parts\.json"):
        integration.PartsAlgorithm(str(folder / "base")).run(pool_of(folder))
    with pytest.raises(ConfigError, match="_pretrained_"):
        algorithm(folder).run({"math": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"the module has no model\."):
        algorithm(folder).run({"_pretrained_": nn.Linear(2, 2)})
    wide = pool_of(folder).load_pretrained_model()
    wide.resize_token_embeddings(100)
    with pytest.raises(ShapeError, match="embed_tokens"):
        algorithm(folder).run({"_pretrained_": wide})


def test_weights_that_cancel_are_refused(folder, tmp_path):
    near = {name: tensor * (1 + 1e-7) for name, tensor in load_file(folder / "math" / "model.safetensors").items()}
    (tmp_path / "near").mkdir()
    from safetensors.torch import save_file

    save_file(near, tmp_path / "near" / "model.safetensors")
    config = MergeConfig("star", base_model=folder / "base", models=[folder / "math", tmp_path / "near"], eta=100)
    decompose_checkpoints(config, tmp_path / "parts")
    with pytest.raises(ConvergenceError, match="cancel"):
        integration.PartsAlgorithm(str(tmp_path / "parts"), weights=[1.0, -1.0]).run(pool_of(folder))


# --- FusionBench's command ---------------------------------------------------------------------------------------


def arguments(folder, out, pool, *more):
    return [
        *("method=rtsvm/parts", f"modelpool={pool}", "taskpool=dummy", "fabric.accelerator=cpu", "print_config=false"),
        *(f"merged_model_save_path={out}", f"path.root_dir={out}-logs", f"hydra.run.dir={out}-hydra", *more),
    ]


@pytest.mark.parametrize("pool", ["eager", "lazy"])
def test_fusion_benchs_command(folder, tmp_path, pool):
    search = f"hydra.searchpath=[{integration.SEARCH_PATH},file://{folder / 'conf'}]"
    more = (
        f"method.parts={os.path.relpath(folder / 'parts', tmp_path)}",
        "method.weights={math:0.25}",
        "method.alpha=1.5",
    )
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [
        Path(sys.executable).with_name("fusion_bench"),
        search,
        *arguments(folder, tmp_path / "out", pool, *more),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = Parts.load(folder / "parts").state_dict({"math": 0.25}, 1.5)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in found)


def test_our_command_draws_several_candidates(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for number, weights in enumerate(("[1.0,0.5,0.0]", "[0.2,0.2,2.0]")):
        search = f"hydra.searchpath=[file://{folder / 'conf'}]"
        more = (f"method.parts={folder / 'parts'}", f"method.weights={weights}", search)
        assert main(["fusion-bench", *arguments(folder, tmp_path / f"out{number}", "eager", *more)]) == 0
        expected = Parts.load(folder / "parts").state_dict(yaml.safe_load(weights))
        found = load_file(tmp_path / f"out{number}" / "model.safetensors")
        assert all(same_bits(found[name], expected[name]) for name in expected)


def test_the_examples_of_the_documentation_run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("base", *TASKS):
        (tmp_path / name).symlink_to(folder / name)
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    decompose, merge = re.search(
        r"^    rtsvm (decompose .*parts)\n    rtsvm (fusion-bench .*)\n.*modelpool=\.\.\.", page, re.M
    ).groups()
    assert main([*shlex.split(decompose), "--quiet"]) == 0
    search = f"hydra.searchpath=[file://{folder / 'conf'}]"
    command = shlex.split(merge.removesuffix("\\"))
    more = [word for word in arguments(folder, tmp_path / "out", "eager", search) if not word.startswith("method=")]
    assert main([*command, *more]) == 0
    found, expected = load_file("out/model.safetensors"), Parts.load("parts").state_dict({"math": 0.8}, 1.2)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    names = {"pool": pool_of(folder)}
    exec(re.search(r"```python\n(from \S*fusion_bench import PartsAlgorithm\n.*?)```", page, re.DOTALL)[1], names)
    expected = Parts.load("parts").state_dict({"math": 1.0})
    assert all(torch.equal(names["model"].state_dict()[name], expected[name]) for name in expected)
