"""FusionBench with our backend. It is no dependency: `make test-integrations` runs this where it is installed."""

import importlib.util
import os
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from compare import assert_as_accurate, same_bits
from torch import nn

from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import CheckpointError, ConfigError, IntegrationError
from r_tsvm_kernels.integrations import _versions
from r_tsvm_kernels.integrations import fusion_bench as integration
from r_tsvm_kernels.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")  # FusionBench and lightning warn about many things of their own
ABSENT = importlib.util.find_spec("fusion_bench") is None
needs_fusion_bench = pytest.mark.skipif(ABSENT, reason="FusionBench is not installed: run make test-integrations")

CONFIGS = sorted((files("r_tsvm_kernels") / "integrations/fusion_bench/conf/method/rtsvm").iterdir())
NAMES = ("_pretrained_", "a", "b", "c")


@pytest.fixture
def accelerated():
    integration.accelerate()
    yield
    integration.restore()


# --- absent, untested or unexpected versions ---------------------------------------------------------------------


@pytest.fixture
def found_version(monkeypatch):
    _versions.check_version.cache_clear()
    yield lambda answer: monkeypatch.setattr(_versions, "version", answer)
    _versions.check_version.cache_clear()


def absent(name):
    raise _versions.PackageNotFoundError(name)


def test_absence_is_an_error_that_says_what_to_install(found_version, capsys):
    found_version(absent)
    with pytest.raises(IntegrationError, match=r"pip install fusion-bench==0\.2\.33"):
        integration.accelerate()
    with pytest.raises(IntegrationError, match=r"pip install fusion-bench==0\.2\.33"):
        integration.MergeAlgorithm  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_name"):
        integration.no_such_name  # noqa: B018
    integration.restore()
    assert main(["fusion-bench", "method=rtsvm/rtsvm"]) == 2
    assert "fusion-bench is not installed" in capsys.readouterr().err


@needs_fusion_bench
def test_an_untested_version_warns_once(found_version):
    found_version(lambda name: "9.9.9")
    with pytest.warns(RuntimeWarning, match=r"fusion-bench 9\.9\.9 was never tested .* tested: 0\.2\.33"):
        integration.accelerate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.accelerate()
    integration.restore()


@needs_fusion_bench
def test_a_missing_function_is_an_error_and_changes_nothing(monkeypatch):
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    before = TSVM_utils.compute_and_sum_svd_mem_reduction
    monkeypatch.delattr(iso_utils, "iso_cts")
    with pytest.raises(IntegrationError, match=r"not built as expected .*iso_cts.*tested: 0\.2\.33"):
        integration.accelerate()
    assert TSVM_utils.compute_and_sum_svd_mem_reduction is before


@needs_fusion_bench
def test_accelerate_can_be_repeated_and_undone():
    from fusion_bench.method.dare import ties_merging as dare
    from fusion_bench.method.isotropic_merging import iso, iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils

    def state():
        return [
            *(TSVM_utils.compute_and_sum_svd_mem_reduction, iso_utils.iso_c, iso_utils.iso_cts, iso.iso_c, iso.iso_cts),
            *(ties_merging_utils.ties_merging, dare.ties_merging),
        ]

    before = state()
    for _ in range(2):
        integration.accelerate()
        integration.accelerate()
        assert all(new is not old for new, old in zip(state(), before, strict=True))
        integration.restore()
        integration.restore()
        assert all(new is old for new, old in zip(state(), before, strict=True))


@needs_fusion_bench
def test_a_module_imported_in_the_meantime_is_restored_too(accelerated, monkeypatch):
    import fusion_bench.method.isotropic_merging.iso_utils as utils

    late = type(sys)("fusion_bench.late")
    late.iso_c = utils.iso_c
    monkeypatch.setitem(sys.modules, late.__name__, late)
    integration.restore()
    assert late.iso_c is utils.iso_c and not hasattr(late.iso_c, "func")


# --- FusionBench's functions on our solvers ----------------------------------------------------------------------


def task_vectors(dtype=torch.float32, tasks=3):
    shapes = {"matrix": (40, 24), "wide": (17, 50), "excluded[0]": (12, 12), "bias": (31,), "conv": (4, 3, 2, 2)}
    return [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(tasks)]


def function(name):
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    if name == "tsvm":
        return lambda v, **kw: TSVM_utils.compute_and_sum_svd_mem_reduction(v, accelerator="cpu", **kw)
    if name == "iso_c":
        return lambda v, **kw: iso_utils.iso_c(v, accelerator="cpu", **kw)
    return lambda v, **kw: iso_utils.iso_cts(v, common_space_fraction=0.7, accelerator="cpu", **kw)


def doubled(vectors):
    return [{name: tensor.double() for name, tensor in vector.items()} for vector in vectors]


@needs_fusion_bench
@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_results_are_as_accurate_as_fusion_benchs(method, tasks):
    vectors = task_vectors(tasks=tasks)
    exclude = ["excluded[0]"]
    exact, theirs = (function(method)(v, exclude_keys=exclude) for v in (doubled(vectors), vectors))
    before = integration.calls().get(method, 0)
    integration.accelerate()
    ours = function(method)(vectors, exclude_keys=exclude)
    integration.restore()
    assert integration.calls()[method] == before + len(vectors[0])
    assert ours.keys() == theirs.keys()
    for name in exact:
        assert_as_accurate(ours[name], theirs[name], exact[name], what=name)


@needs_fusion_bench
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_half_precision_is_rounded_once(method):
    vectors = task_vectors(torch.bfloat16)
    exact = function(method)(doubled(vectors))
    integration.accelerate()
    ours = function(method)(vectors)  # FusionBench's Iso-C and Iso-CTS fail: torch has no SVD in bfloat16
    integration.restore()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=1e-4 * float(exact[name].abs().max()))


@needs_fusion_bench
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_what_we_do_not_take_is_left_to_fusion_bench(method):
    vectors = doubled(task_vectors())
    expected = function(method)(vectors)
    before = integration.calls()
    integration.accelerate()
    for name, tensor in function(method)(vectors).items():
        assert same_bits(tensor, expected[name])
    assert integration.calls() == before
    integration.restore()
    vectors = task_vectors()
    vectors[1]["bias"][3] = torch.inf
    expected = function(method)(vectors)["bias"]
    integration.accelerate()
    torch.testing.assert_close(function(method)(vectors)["bias"], expected, rtol=0, atol=0, equal_nan=True)
    integration.restore()
    assert not expected.isfinite().all()


@needs_fusion_bench
def test_single_task_models_are_left_to_fusion_bench(accelerated):
    merged, single = function("tsvm")(task_vectors(), return_single_task_models=True)
    assert len(single) == 3 and single[0].keys() == merged.keys()


# --- TIES --------------------------------------------------------------------------------------------------------


def ties(rows, threshold, how):
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    return ties_merging(rows, reset_thresh=threshold, merge_func=how)


def both(rows, threshold, how):
    """FusionBench's TIES, and it with our backend; how often our kernel was called."""
    theirs, before = ties(rows, threshold, how), integration.calls().get("elect_and_sum", 0)
    integration.accelerate()
    ours = ties(rows, threshold, how)
    integration.restore()
    return theirs, ours, integration.calls().get("elect_and_sum", 0) - before


@needs_fusion_bench
@pytest.mark.parametrize("how", ["sum", "mean", "dis-mean"])
@pytest.mark.parametrize("threshold", [20, 0.2, 1, 0.999, 0, 73.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_is_fusion_benchs(dtype, threshold, how):
    rows = torch.randn(3, 1009).to(dtype)
    if threshold == 1:
        rows = rows[:, :1000]
        with pytest.raises(RuntimeError):  # all elements: the smallest but one too many
            ties(rows, threshold, how)
        integration.accelerate()
        with pytest.raises(RuntimeError):
            ties(rows, threshold, how)
        integration.restore()
        return
    theirs, ours, calls = both(rows, threshold, how)
    assert calls == 1 and ours.dtype == theirs.dtype and ours.count_nonzero()
    precision = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, theirs, rtol=precision, atol=1e-6)


@needs_fusion_bench
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("lean", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("tasks", [2, 4])
def test_ties_among_magnitudes_and_sums_of_zero_go_as_in_fusion_bench(tasks, lean, how):
    rows = torch.randint(-3, 4, (tasks, 5000)).float()
    if lean:
        rows[0, : int(5000 * abs(lean))] = 9 * lean / abs(lean)
    else:
        rows = torch.cat([rows, -rows], dim=1)  # as many positive as negative sums: no majority
    for threshold in (15, 60):
        theirs, ours, calls = both(rows, threshold, how)
        assert calls == 1 and int(((rows != 0).any(0) & (rows.sum(0) == 0)).sum()) > 100
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@needs_fusion_bench
def test_ties_that_we_do_not_take_is_left_to_fusion_bench():
    rows = torch.randn(3, 100)
    infinite = rows.clone()
    infinite[1, 5] = torch.inf
    for given, how in ((rows, "max"), (rows.double(), "sum"), (infinite, "sum")):
        theirs, ours, calls = both(given, 20, how)
        assert calls == 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    integration.accelerate()
    assert ties(rows.requires_grad_(), 20, "sum").requires_grad
    with pytest.raises(ValueError, match="not defined"):
        ties(rows.detach(), 20, "median")
    integration.restore()


# --- our methods as FusionBench's algorithms ---------------------------------------------------------------------


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

    if METHODS[method].tasks == 1:
        del networks["b"], networks["c"]
    before = copies(networks)
    algorithm = integration.MergeAlgorithm(method, {"exclude_keys": ["last*"]} if method == "tsvm" else None)
    merged = algorithm.run(BaseModelPool(networks) if as_pool else networks).state_dict()
    base, *tuned = before.values()
    parameters = {"exclude_keys": ["last*"]} if method == "tsvm" else {}
    expected = merge_state_dicts(base, tuned, MergeConfig.from_kwargs(method, **parameters))
    # A tied tensor goes by its first name, which is another seed for random masks.
    expected.state_dict["tied.weight"] = expected.state_dict["first.weight"]
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert same_bits(tensor, expected.state_dict[name]), name
    assert merged["norm.num_batches_tracked"] == 3  # an integer buffer, which FusionBench's own TSVM fails on
    assert not torch.equal(merged["first.weight"], base["first.weight"])
    assert merged["first.weight"].data_ptr() == merged["tied.weight"].data_ptr()
    assert {r.method for r in algorithm.reports.values()} == {method}
    for name, model in networks.items():  # the pool's own modules are as they were
        assert all(same_bits(tensor, before[name][key]) for key, tensor in model.state_dict().items())


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
def test_a_method_without_a_base_needs_no_pretrained_model(networks):
    base = networks.pop("_pretrained_").state_dict()
    merged = integration.MergeAlgorithm("linear", None, {"a": {"weight": 2.0}}).run(networks).state_dict()
    a, b, c = (model.state_dict()["first.weight"].double() for model in networks.values())
    torch.testing.assert_close(merged["first.weight"].double(), (2 * a + b + c) / 4, rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged["first.weight"], base["first.weight"])


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
        assert config["parameters"].keys() == schema.model_fields.keys() - {"int8_mask"}  # which changes nothing
        assert schema(**config["parameters"]) == schema()
        assert config["_target_"] == f"{integration.__name__}.MergeAlgorithm"


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
