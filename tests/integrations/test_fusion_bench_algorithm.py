"""Our methods as FusionBench's algorithms, and its command. `make test-integrations` runs this."""

import importlib.util
import inspect
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from compare import same_bits
from torch import nn

from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import CheckpointError, ConfigError, QuantisedRefusedError
from r_tsvm_kernels.integrations import fusion_bench as integration
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.methods.rtsvm import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore")  # FusionBench and lightning warn about many things of their own
ABSENT = importlib.util.find_spec("fusion_bench") is None
needs_fusion_bench = pytest.mark.skipif(ABSENT, reason="FusionBench is not installed: run make test-integrations")

FOLDER = files("r_tsvm_kernels") / "integrations/fusion_bench/conf/method/rtsvm"
CONFIGS = sorted(path for path in FOLDER.iterdir() if path.name != "parts.yaml")  # no method
NAMES = ("_pretrained_", "a", "b", "c")
WITHOUT_A_BASE = [name for name, method in METHODS.items() if not method.needs_base]


class Network(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 24)
        self.tied = nn.Linear(24, 40)
        self.tied.weight = self.first.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                generator.manual_seed(generator.initial_seed() + 1)
            generator.manual_seed(1000 + seed)
            for parameter in self.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.norm.num_batches_tracked += 10 * seed + 3


@pytest.fixture
def networks():
    return {name: Network(seed) for seed, name in enumerate(NAMES)}


def copies(networks):
    return {name: {k: t.clone() for k, t in model.state_dict().items()} for name, model in networks.items()}


@needs_fusion_bench
@pytest.mark.parametrize("as_pool", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_an_algorithm(method, as_pool, networks):
    from fusion_bench import BaseModelPool

    for name in NAMES[1 + (METHODS[method].tasks or 3) :]:
        del networks[name]
    before = copies(networks)
    algorithm = integration.MergeAlgorithm(method, {"exclude_keys": ["last*"]} if method == "tsvm" else None)
    merged = algorithm.run(BaseModelPool(networks) if as_pool else networks).state_dict()
    base, *tuned = before.values()
    parameters = {"exclude_keys": ["last*"]} if method == "tsvm" else {}
    expected = merge_state_dicts(base, tuned, MergeConfig(method, **parameters))
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert same_bits(tensor, expected.state_dict[name]), name
    kept = 13 if method == "passthrough" else 3  # an integer buffer, which FusionBench's own TSVM fails on
    assert merged["norm.num_batches_tracked"] == kept
    assert not torch.equal(merged["first.weight"], base["first.weight"])
    assert merged["first.weight"].data_ptr() == merged["tied.weight"].data_ptr()
    assert {r.method for r in algorithm.reports.values()} == {method}
    for name, model in networks.items():  # the pool's own modules are as they were
        assert all(same_bits(tensor, before[name][key]) for key, tensor in model.state_dict().items())


@needs_fusion_bench
def test_a_model_that_unties_what_the_pretrained_one_ties_is_refused(networks):
    tied = networks["b"].tied
    tied.weight = nn.Parameter(tied.weight.detach() + 1)
    with pytest.raises(CheckpointError, match=r"^b: the pretrained model ties first\.weight to tied\.weight, but"):
        integration.MergeAlgorithm("task_arithmetic").run(networks)


@needs_fusion_bench
def test_quantised_models_and_other_tables_are_refused(networks):
    for model in networks.values():
        model.register_buffer("table", torch.arange(6).reshape(2, 3))
    merged = integration.MergeAlgorithm("task_arithmetic").run(networks)
    assert torch.equal(merged.table, torch.arange(6).reshape(2, 3))
    networks["b"].table[1, 2] = 0
    with pytest.raises(QuantisedRefusedError, match=r"table of b: int64 of 2 x 3, differs from the base's"):
        integration.MergeAlgorithm("task_arithmetic").run(networks)
    for model in networks.values():
        model.register_buffer("table", torch.ones(2, 3, dtype=torch.int8))
        model.register_buffer("table_scale", torch.ones(2, 1))
    with pytest.raises(
        QuantisedRefusedError, match=r"the pretrained model: .* table is int8 of 2 x 3, and table_scale belongs"
    ):
        integration.MergeAlgorithm("task_arithmetic").run(networks)


@needs_fusion_bench
def test_parameters_of_single_models_filters_and_exclusions(networks):
    before = copies(networks)
    parameters = {"alpha": [{"filter": "last", "value": 0.5}, {"value": 0.2}], "rank": 4}
    own = {"c": {"weight": 0.1, "density": 0.5}, "a": {"weight": 2.0}}
    algorithm = integration.MergeAlgorithm("rtsvm", parameters, own, exclude=["norm.*"])
    merged = algorithm.run(networks).state_dict()
    config = MergeConfig(
        models=[{"parameters": own.get(name, {})} for name in NAMES[1:]], parameters=parameters, exclude=["norm.*"]
    )
    base, *tuned = before.values()
    expected = merge_state_dicts(base, tuned, config).state_dict
    assert all(same_bits(merged[name], expected[name]) for name in expected)
    assert torch.equal(merged["norm.weight"], base["norm.weight"])


@needs_fusion_bench
def test_hyper_parameters_serialise(networks, tmp_path):
    from fusion_bench import BaseAlgorithm

    algorithm = integration.MergeAlgorithm("ties", {"density": 0.3}, {"b": {"weight": 0.4}}, include=["first.*"])
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = BaseAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert type(again) is integration.MergeAlgorithm and again.config == algorithm.config
    assert again.recipe(["a", "b"]) == algorithm.recipe(["a", "b"])
    first, second = (a.run(networks).state_dict() for a in (algorithm, again))
    assert all(same_bits(first[name], second[name]) for name in first)


@needs_fusion_bench
def test_matrices_in_tensors():
    """Packed experts, convolutions and fused projections, with a router, as in `merge_state_dicts`."""
    shapes = {"gate_up_proj": (3, 20, 12), "down_proj": (3, 12, 10)}
    models = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        models[name] = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "qkv": nn.Linear(12, 24), "router": nn.Linear(12, 3)})
        models[name]["experts"] = nn.Module()
        for key, shape in shapes.items():
            models[name]["experts"].register_parameter(key, nn.Parameter(torch.randn(shape)))
    base, *tuned = copies(models).values()
    settings = {"router": "base", "conv": "flatten", "split": {"qkv.*": [12, 6, 6]}}
    algorithm = integration.MergeAlgorithm("tsvm", **settings)
    merged = algorithm.run(models).state_dict()
    expected = merge_state_dicts(base, tuned, MergeConfig("tsvm", **settings))
    assert all(same_bits(merged[name], expected.state_dict[name]) for name in expected.state_dict)
    assert len(algorithm.reports["experts.gate_up_proj"].blocks) == 6
    assert torch.equal(merged["router.weight"], base["router.weight"])


@needs_fusion_bench
def test_a_method_without_a_base_needs_no_pretrained_model(networks):
    base = networks.pop("_pretrained_").state_dict()
    merged = integration.MergeAlgorithm("linear", None, {"a": {"weight": 2.0}}).run(networks).state_dict()
    a, b, c = (model.state_dict()["first.weight"].double() for model in networks.values())
    torch.testing.assert_close(merged["first.weight"].double(), (2 * a + b + c) / 4, rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged["first.weight"], base["first.weight"])


@needs_fusion_bench
@pytest.mark.parametrize("method", WITHOUT_A_BASE)
def test_pools_without_a_pretrained_model(method, networks):
    """The first model then gives what is not merged; methods with an optional base go without task vectors."""
    for name in ("_pretrained_", *NAMES[1 + (METHODS[method].tasks or 3) :]):
        del networks[name]
    before = copies(networks)
    algorithm = integration.MergeAlgorithm(method)
    merged = algorithm.run(networks).state_dict()
    expected = merge_state_dicts(None, list(before.values()), MergeConfig(method)).state_dict
    assert merged.keys() == expected.keys()
    assert all(same_bits(merged[name], expected[name]) for name in expected)
    first = next(iter(before.values()))
    assert torch.equal(merged["norm.num_batches_tracked"], first["norm.num_batches_tracked"])
    assert torch.equal(merged["first.weight"], first["first.weight"]) == (method == "passthrough")
    assert {r.method for r in algorithm.reports.values()} == {method}
    for name, model in networks.items():
        assert all(same_bits(tensor, before[name][key]) for key, tensor in model.state_dict().items())


@needs_fusion_bench
@pytest.mark.parametrize("method", ["rtsvm", "slerp", "ties"])
def test_other_methods_ask_for_a_pretrained_model(method, networks):
    del networks["_pretrained_"]
    with pytest.raises(ConfigError, match=f"^{method} needs a pretrained model, .* add _pretrained_"):
        integration.MergeAlgorithm(method).run(networks)


@needs_fusion_bench
@pytest.mark.parametrize("method", ["linear", "nuslerp"])
def test_a_calibration_asks_for_a_pretrained_model(method, networks):
    del networks["_pretrained_"], networks["c"]
    with pytest.raises(ConfigError, match="calibrate"):
        integration.MergeAlgorithm(method, calibrate="svc").run(networks)


@needs_fusion_bench
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("method", WITHOUT_A_BASE)
def test_pools_of_files_without_a_pretrained_model(folder, method, lazy):
    from fusion_bench.modelpool import CausalLMPool

    names = NAMES[1 : 4 if METHODS[method].tasks is None else 1 + METHODS[method].tasks]
    pool = CausalLMPool({name: str(folder / name) for name in names}, tokenizer=None, enable_lazy_loading=lazy)
    merged = integration.MergeAlgorithm(method).run(pool).state_dict()
    models = [weights(folder / name) for name in names]
    expected = merge_state_dicts(None, models, MergeConfig(method)).state_dict
    assert merged.keys() - expected.keys() == {"lm_head.weight"}  # tied
    assert all(same_bits(merged[name], expected[name]) for name in expected)


@needs_fusion_bench
def test_only_the_target_modules_of_a_model_are_merged(networks):
    for model in networks.values():
        model._fusion_bench_target_modules = ["last"]
    algorithm = integration.MergeAlgorithm("task_arithmetic")
    merged, base = algorithm.run(networks).state_dict(), networks["_pretrained_"].state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert changed == {"last.weight", "last.bias"} and len(algorithm.reports) == 2


@needs_fusion_bench
def test_mistakes_are_errors_before_any_model_is_loaded(networks):
    algorithm = integration.MergeAlgorithm
    with pytest.raises(ConfigError, match="did you mean 'rtsvm'"):
        algorithm("rtsvn")
    with pytest.raises(ConfigError, match="unknown key 'densty'; did you mean 'density'"):
        algorithm("ties", {"densty": 0.3})
    with pytest.raises(ConfigError, match=r"unknown key 'alpha'; .* under `parameters`"):
        algorithm("ties", alpha=0.3)
    with pytest.raises(ConfigError, match="wieght"):
        algorithm("ties", None, {"a": {"wieght": 0.3}})
    with pytest.raises(ConfigError, match=r"no model 'd' in the pool; .*\['a', 'b', 'c'\]"):
        algorithm("ties", None, {"d": {"weight": 0.3}}).run(networks)
    networks["c"] = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"c: its tensors are not the base's"):
        algorithm("ties").run(networks)


# --- FusionBench's command ---------------------------------------------------------------------------------------


def test_the_configurations_show_every_parameter_with_its_default():
    assert {path.name for path in CONFIGS} == {f"{name}.yaml" for name in METHODS}
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        schema = METHODS[config["merge_method"]].parameters
        assert path.name == f"{config['merge_method']}.yaml"
        left_out = {"int8_mask", *(PRESETS["weighted"] if "preset" in schema.model_fields else ())}
        assert config["parameters"].keys() == schema.model_fields.keys() - left_out  # int8_mask changes nothing
        assert schema(**config["parameters"]) == schema()
        assert config["_target_"] == f"{integration.__name__}.MergeAlgorithm"


@needs_fusion_bench
def test_the_configuration_of_parts_shows_every_argument_with_its_default():
    config = yaml.safe_load((FOLDER / "parts.yaml").read_text())
    assert config.pop("_target_") == f"{integration.__name__}.PartsAlgorithm"
    arguments = inspect.signature(integration.PartsAlgorithm.__init__).parameters
    defaults = {name: own.default for name, own in arguments.items() if name not in ("self", "metadata")}
    assert config == defaults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and three fine-tunes on disk, and configurations of pools of them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(NAMES):
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
    (out / "conf" / "modelpool").mkdir(parents=True)
    for name, lazy in (("eager", False), ("lazy", True)):
        config = {
            "_target_": "fusion_bench.modelpool.CausalLMPool",
            "models": {name: str(out / name) for name in NAMES},
            "tokenizer": None,
            "model_kwargs": {"torch_dtype": "float32"},
            "enable_lazy_loading": lazy,
        }
        (out / "conf" / "modelpool" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return out


def arguments(folder, out, method, pool, *more):
    return [
        *(f"method={method}", f"modelpool={pool}", "taskpool=dummy", "fabric.accelerator=cpu", "print_config=false"),
        *(f"merged_model_save_path={out}", f"path.root_dir={out}-logs", f"hydra.run.dir={out}-hydra", *more),
    ]


def weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def merged_by_us(folder, config):
    base, *tuned = (weights(folder / name) for name in NAMES)
    return merge_state_dicts(base, tuned, config).state_dict


@needs_fusion_bench
@pytest.mark.parametrize("pool", ["eager", "lazy"])
def test_fusion_benchs_command_finds_our_configurations(folder, tmp_path, pool):
    out = tmp_path / "merged"
    search = f"hydra.searchpath=[{integration.SEARCH_PATH},file://{folder / 'conf'}]"
    more = ("method.parameters.alpha=0.5", "+method.model_parameters.b.weight=0.25", "method.exclude=['*layers.1*']")
    command = [Path(sys.executable).with_name("fusion_bench"), search]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, *arguments(folder, out, "rtsvm/rtsvm", pool, *more)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is not available" not in done.stderr  # what Hydra says of a search path that is not there
    models = [{}, {"parameters": {"weight": 0.25}}, {}]
    expected = merged_by_us(folder, MergeConfig(models=models, parameters={"alpha": 0.5}, exclude=["*layers.1*"]))
    merged = weights(out)
    assert merged.keys() == expected.keys()
    assert all(same_bits(merged[name], expected[name]) for name in merged)


@needs_fusion_bench
def test_a_lazy_pool_gives_a_model_that_runs(folder):
    from fusion_bench.modelpool import CausalLMPool

    tokens, logits = torch.arange(8)[None], []
    for lazy in (False, True):
        paths = {name: str(folder / name) for name in NAMES}
        pool = CausalLMPool(paths, tokenizer=None, enable_lazy_loading=lazy)
        model = integration.MergeAlgorithm("tsvm").run(pool)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


@needs_fusion_bench
@pytest.mark.parametrize("accelerate", [True, False])
def test_our_command_runs_fusion_benchs_own_methods(folder, tmp_path, monkeypatch, accelerate):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    out, before = tmp_path / "merged", integration.calls()
    search = [f"hydra.searchpath=[file://{folder / 'conf'}]", *([] if accelerate else ["--no-accelerate"])]
    method = "task_singular_vector/TaskSingularVectorMerging"
    assert main(["fusion-bench", *arguments(folder, out, method, "eager", *search)]) == 0
    expected = merged_by_us(folder, MergeConfig(merge_method="tsvm"))
    merged, base = weights(out), weights(folder / "_pretrained_")
    for name, tensor in merged.items():
        scale = float((expected[name] - base[name]).abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-3 * scale)
    # lm_head is tied, but a tensor of its own to FusionBench.
    assert integration.calls().get("tsvm", 0) - before.get("tsvm", 0) == accelerate * (len(merged) + 1)
    assert main(["fusion-bench", *arguments(folder, out, "rtsvm/no_such_method", "eager", *search)]) == 1
