"""The first calls that a torch user types work as typed, or fail with a helpful message."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from checkpoints import family
from compare import same_bits
from merging import group
from safetensors.torch import load_file
from torch import nn

import r_tsvm_kernels
from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    DTypeError,
    MergeConfig,
    MergeResult,
    TensorReport,
    Verification,
    errors,
    extract_lora,
    merge_checkpoints,
    merge_lora,
    merge_models,
    merge_state_dicts,
    merge_tensors,
    verify_output,
)

FIRST_CALLS = """
import torch
from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_models, merge_state_dicts, merge_tensors

base = torch.randn(64, 48)
tuned = [base + 0.01 * torch.randn(64, 48) for _ in range(2)]
print(merge_tensors(base, tuned, "ties", weight=[1.0, 0.5], density=0.2))
print(merge_tensors(base, tuned, MergeConfig("rtsvm", weight=0.5)))
print(merge_checkpoints("recipe.yaml", "merged"))
modules = [torch.nn.Linear(8, 4) for _ in range(3)]
print(merge_models(modules[0], modules[1:], "rtsvm"))
print(merge_state_dicts(modules[0], modules[1:], "linear"))
"""
SHOWN = """\
MergeResult(64x48 float32, ties)
MergeResult(64x48 float32, rtsvm, ranks
CheckpointResult(
Linear(in_features=8, out_features=4, bias=True)
StateDictResult(2 tensors, linear)
"""


def test_the_first_calls_in_a_fresh_shell(tmp_path):
    (base, *tuned), tensors, _ = family(tmp_path / "in")
    models = "".join(f"  - model: {path}\n" for path in tuned)
    (tmp_path / "recipe.yaml").write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}")
    command = [sys.executable, "-c", FIRST_CALLS]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    assert len(lines) == 5 and all(map(str.startswith, lines, SHOWN.splitlines())) and not shown.stderr
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("form", [str, lambda path: path, MergeConfig.from_yaml], ids=["text", "path", "config"])
def test_a_recipe_in_every_form(tmp_path, form):
    (base, expert, _), tensors, tuned = family(tmp_path / "in")
    (tmp_path / "r.yml").write_text(f"merge_method: ties\nbase_model: {base}\nmodels: [{{model: {expert}}}]\n")
    merge_checkpoints(form(tmp_path / "r.yml"), tmp_path / "out")
    want = merge_state_dicts(tensors, tuned[:1], "ties").state_dict
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(got[name], tensor) for name, tensor in want.items())


def test_parameters_as_keywords_are_those_of_a_config():
    base, tuned = group()
    want = merge_tensors(base, tuned, MergeConfig("ties", weight=[1, 2, 3], density=0.2)).weight
    assert same_bits(merge_tensors(base, tuned, "ties", weight=[1, 2, 3], density=0.2).weight, want)
    named = [{"w": tensor} for tensor in tuned]
    assert same_bits(merge_state_dicts({"w": base}, named, "ties", weight=[1, 2, 3], density=0.2).state_dict["w"], want)
    ones = merge_tensors(base, tuned, "ties", weight=[2.0] * 3, density=[0.2] * 3).weight
    assert same_bits(merge_tensors(base, tuned, "ties", weight=2.0, density=0.2).weight, ones)
    excluded = merge_state_dicts({"w": base}, named, "ties", exclude=["w"]).state_dict["w"]
    assert same_bits(excluded, base)


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_without_a_base(method):
    base, tuned = group(dtype=torch.bfloat16)
    want = merge_tensors(base, tuned, method).weight
    assert same_bits(merge_tensors(None, tuned, method).weight, want)
    named = [{"w": tensor, "n": torch.arange(3)} for tensor in tuned]
    got = merge_state_dicts(None, named, method).state_dict
    assert same_bits(got["w"], want) and torch.equal(got["n"], torch.arange(3))


@pytest.mark.parametrize("dtype", ["float16", torch.float16], ids=str)
def test_out_dtype_by_name_or_as_it_is(dtype):
    base, tuned = group()
    want = merge_tensors(base, tuned, "ties").weight.half()
    assert same_bits(merge_tensors(base, tuned, "ties", out_dtype=dtype).weight, want)
    for config in ("ties", MergeConfig("ties")):
        state_dicts = {"w": base}, [{"w": tensor} for tensor in tuned]
        assert same_bits(merge_state_dicts(*state_dicts, config, out_dtype=dtype).state_dict["w"], want)


class Small(nn.Module):
    """Tied, frozen and shared parameters, buffers of both kinds, and an attribute that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("scale", torch.rand(1), persistent=False)
        self.config = {"sizes": [11, 6]}


def small(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return Small().to(dtype)


@pytest.mark.parametrize("method", ["rtsvm", "ties", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_modules(method, dtype):
    base, *tuned = (small(seed, dtype) for seed in range(3))
    base.norm.train()
    base.head.eval()
    (base.embed.weight.sum()).backward()
    before = [copy.deepcopy(module.state_dict()) for module in (base, *tuned)]
    merged = merge_models(base, tuned, method)
    want = merge_state_dicts(base, tuned, method).state_dict
    assert type(merged) is Small and list(merged.state_dict()) == list(want)
    assert all(same_bits(tensor, want[name]) for name, tensor in merged.state_dict().items())
    assert merged.head.weight is merged.embed.weight and merged.embed.weight.grad is None
    assert same_bits(merged.scale, base.scale) and merged.config == base.config and merged.config is not base.config
    for module in ("embed", "norm", "head"):
        assert getattr(merged, module).training == getattr(base, module).training
    for (name, ours), (_, theirs) in zip(merged.named_parameters(), base.named_parameters(), strict=True):
        assert type(ours) is nn.Parameter and (ours.dtype, ours.requires_grad) == (theirs.dtype, theirs.requires_grad)
        assert ours.data_ptr() != theirs.data_ptr(), name
    for module, state in zip((base, *tuned), before, strict=True):
        assert all(same_bits(tensor, state[name]) for name, tensor in module.state_dict().items())
    merged.norm(merged.embed(torch.arange(4))).sum().backward()
    assert merged.embed.weight.grad is not None and merged.norm.bias.grad is None


def test_merged_modules_in_another_dtype():
    base, *tuned = (small(seed) for seed in range(3))
    merged = merge_models(base, tuned, "task_arithmetic", alpha=0.5, out_dtype="bfloat16")
    want = merge_state_dicts(base, tuned, "task_arithmetic", alpha=0.5).state_dict
    for name, tensor in merged.state_dict().items():
        assert same_bits(tensor, want[name].bfloat16() if want[name].is_floating_point() else want[name])


def test_merged_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    base, *tuned = (transformers.LlamaForCausalLM(config).eval() for _ in range(3))
    merged = merge_models(base, tuned, "rtsvm")
    assert type(merged) is type(base) and merged.lm_head.weight is merged.model.embed_tokens.weight
    want = merge_state_dicts(base, tuned, "rtsvm").state_dict
    assert all(same_bits(tensor, want[name]) for name, tensor in merged.state_dict().items())
    tokens = torch.arange(5)[None]
    logits = merged(tokens).logits
    base.load_state_dict(want)
    assert torch.equal(base(tokens).logits, logits) and not merged.training


class Renamed(nn.Linear):
    """Builds its state dict itself."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}twice"] = 2 * self.weight.detach()


def untied(seed):
    module = small(seed)
    module.head.weight = nn.Parameter(module.head.weight.detach() + 1)
    return module


MODULE_MISTAKES = {
    "a state dict": (lambda: (small(0), [small(1).state_dict()]), {}, DTypeError, r"tuned\[0\]: expected a torch.nn.M"),
    "no list": (
        lambda: (small(0), small(1)),
        {},
        DTypeError,
        "expected a list of modules, got Small; put it",
    ),
    "no base": (lambda: (None, [small(1)]), {}, DTypeError, "the base: expected a torch.nn.Module, got NoneType"),
    "other names": (lambda: (small(0), [nn.Linear(2, 2)]), {}, CheckpointError, r"tuned\[0\]: its tensors are not"),
    "untied": (lambda: (small(0), [untied(1)]), {}, ConfigError, "is a tied parameter of the base, but a fine-tune"),
    "apart": (lambda: (small(0), [small(1)]), {"exclude": ["head.*"]}, ConfigError, "or the config treats its names"),
    "own state dict": (lambda: (Renamed(2, 2), [Renamed(2, 2)]), {}, ConfigError, "Renamed: twice of its state dict"),
}


@pytest.mark.parametrize(("modules", "keywords", "error", "message"), MODULE_MISTAKES.values(), ids=MODULE_MISTAKES)
def test_modules_that_cannot_be_merged(modules, keywords, error, message):
    with pytest.raises(error, match=message):
        merge_models(*modules(), "task_arithmetic", **keywords)


MISTAKES = {
    "no base": (lambda b, t: merge_tensors(None, t, "ties"), ConfigError, "ties: expected a base, got None; only kar"),
    "no config": (lambda b, t: merge_tensors(b, t, None), ConfigError, "'ties', or a MergeConfig, got NoneType"),
    "a recipe": (lambda b, t: merge_tensors(b, t, "r.yaml"), ConfigError, "use MergeConfig.from_yaml for a recipe"),
    "weights": (lambda b, t: merge_tensors(b, t, "ties", weights=0.2), ConfigError, "did you mean 'weight'"),
    "both": (lambda b, t: merge_tensors(b, t, MergeConfig("ties"), density=0.2), ConfigError, "beside a MergeConfig"),
    "too many": (lambda b, t: merge_tensors(b, t, "ties", weight=[1] * 4), ConfigError, "^weight: got 4 for 3 fine"),
    "too few": (lambda b, t: merge_tensors(b, t, MergeConfig("ties", models=["a"])), ConfigError, "^models: got 1"),
    "none each": (lambda b, t: merge_tensors(b, t, "ties", density=[]), ConfigError, "density: got 0 value"),
    "a position": (lambda b, t: merge_tensors(b, t, "ties", position=3), ConfigError, "a position in .0, 1., got 3"),
    "before": (lambda b, t: merge_tensors(b, t, "ties", position=-0.5), ConfigError, "a position in .0, 1., got -0.5"),
    "numbered": (lambda b, t: merge_state_dicts({1: b}, [{1: t[0]}], "ties"), DTypeError, "tensors as keys, got 1"),
    "extra state": (lambda b, t: merge_state_dicts({"w": {}}, [{"w": {}}], "ties"), DTypeError, "Tensor, got dict$"),
    "generator": (lambda b, t: merge_tensors(b, iter(t), "ties"), DTypeError, "list_iterator; convert it with list"),
    "ModuleList": (
        lambda b, t: merge_models(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]), "ties"),
        DTypeError,
        "got ModuleList; convert it with list",
    ),
    "lazy modules": (
        lambda b, t: merge_models(nn.LazyLinear(2), [nn.LazyLinear(2)], "ties"), DTypeError, "run the module on an inp"
    ),
    "one module": (
        lambda b, t: merge_models(nn.Linear(2, 2), nn.Linear(2, 2), "ties"), DTypeError, "Linear; put it in a list"
    ),
    "capitals": (lambda b, t: merge_tensors(b, t, "TIES"), ConfigError, "did you mean 'ties'. Available: "),
    "like none": (lambda b, t: merge_tensors(b, t, "xxxx"), ConfigError, "'xxxx'; available: arcee_fusion, "),
    "of another": (lambda b, t: merge_tensors(b, t, "sce", density=0.1), ConfigError, "'density'; recipe fields: base"),
    "no sum": (lambda b, t: merge_tensors(b, t, "linear", weight=0), ConfigError, "normalized; set normalize: false"),
    "no sum, multislerp": (
        lambda b, t: merge_tensors(b, t, "multislerp", weight=0), ConfigError, "; set normalize_weights: false"
    ),
    "no sum, karcher": (lambda b, t: merge_tensors(b, t, "karcher", weight=0), ConfigError, "; choose others"),
    "no sum, model_stock": (lambda b, t: merge_tensors(b, t, "model_stock", weight=0), ConfigError, "; choose others"),
    "no sum of adapters": (
        lambda b, t: merge_lora(["a", "b"], "out", method="linear", weight=[1, -1]),
        ConfigError,
        "normalized; use the method task_arithmetic",
    ),
    "modules": (lambda b, t: merge_tensors(nn.Linear(2, 2), t, "ties"), DTypeError, "module Linear; use merge_models"),
    "float8": (
        lambda b, t: merge_tensors(b.to(torch.float8_e4m3fn), t, "ties"),
        DTypeError,
        "^tensor: torch.float8_e4m3fn cannot be merged",
    ),
    "out_dtype": (lambda b, t: merge_tensors(b, t, "ties", out_dtype="int8"), ConfigError, "float64.*, got 'int8'"),
    "nothing": (lambda b, t: merge_tensors(None, [], "linear"), ConfigError, "at least one fine-tuned model"),
    "a number": (lambda b, t: merge_state_dicts(3, [{"w": t[0]}], "ties"), DTypeError, "or a module, got int"),
    "no recipe": (lambda b, t: merge_checkpoints("none.yaml", "out"), ConfigError, "cannot read the recipe none.yaml"),
    "a dict": (lambda b, t: merge_checkpoints({"models": []}, "out"), ConfigError, "got dict; from_dict takes a map"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_errors_of_our_own(call, error, message):
    with pytest.raises(error, match=message):
        call(*group())


def test_results_are_shown_in_one_line():
    base, tuned = group((24, 17))
    result = merge_tensors(base, tuned, "rtsvm", rank=3)
    error = f"error {result.report.certificate.error:.1g} ok"
    assert repr(result) == str(result) == f"MergeResult(24x17 float32, rtsvm, ranks 3/3/3, {error})"
    assert repr(result.report) == f"TensorReport(24x17, rtsvm, ranks 3/3/3, {error}, {result.report.seconds:.3g} s)"
    assert repr(merge_tensors(base[0], [t[0] for t in tuned], "tsvm")) == (
        "MergeResult(17 float32, tsvm, mean task vector (not a matrix))"
    )
    assert repr(merge_tensors(torch.tensor(1), [torch.tensor(2)], "ties")) == (
        "MergeResult(scalar int64, ties, the base's value (int64 buffer))"
    )
    assert repr(TensorReport(method="rtsvm", shape=(9, 9), ranks=[1, 2] * 5, seconds=1.0)) == (
        "TensorReport(9x9, rtsvm, 10 ranks from 1 to 2, 1 s)"
    )
    assert repr(MergeResult(torch.ones(2), TensorReport(shape=(2,)))) == "MergeResult(2 float32)"
    named = {"w": base, "b": base[0]}, [{"w": tensor, "b": tensor[0]} for tensor in tuned]
    assert repr(merge_state_dicts(*named, "tsvm", exclude=["b"])).startswith(
        "StateDictResult(2 tensors, tsvm, 1 the base's, largest error "
    )


def test_merges_are_logged(caplog):
    base, tuned = group()
    with caplog.at_level(logging.DEBUG, logger="r_tsvm_kernels"):
        merge_state_dicts({"w": base}, [{"w": tensor} for tensor in tuned], "ties")
    first, last = caplog.records
    assert first.getMessage().startswith("w: TensorReport(24x17, ties, ") and first.levelno == logging.DEBUG
    assert last.getMessage().startswith("merged 1 tensor, ties in ") and last.levelno == logging.INFO


def test_the_root_shows_public_names_only():
    shown = dir(r_tsvm_kernels)
    assert set(shown) == {*r_tsvm_kernels.__all__, "__version__"}
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(shown)


def test_results_on_disk_are_shown_in_one_line(tmp_path):
    (base, *tuned), tensors, _ = family(tmp_path / "in")
    config = MergeConfig("tsvm", base_model=base, models=tuned)
    result = merge_checkpoints(config, tmp_path / "out")
    summary = f"{len(tensors)} tensors, tsvm, "
    assert repr(result).startswith(f"CheckpointResult({summary}") and repr(result).count("\n") == 0
    assert str(tmp_path / "out") in repr(result) and len(repr(result)) < 200 + len(str(tmp_path))
    assert repr(verify_output(tmp_path / "out")) == f"Verification({len(tensors)} tensors, ok)"
    assert repr(Verification(3, missing=["a"], changed=["b", "c"])) == "Verification(3 tensors, 1 missing, 2 changed)"
    adapter = extract_lora(base, tuned[0], tmp_path / "lora", rank=2, out_dtype=torch.bfloat16)
    assert repr(adapter).startswith(f"AdapterResult({len(adapter.modules)} modules, ")
    assert {t.dtype for t in load_file(adapter.path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="adapters: expected a list of folders or ids"):
        merge_lora(adapter.path, tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"expected a dtype among float64, .*, got 'half'"):
        merge_lora([adapter.path], tmp_path / "merged", out_dtype="half")
    assert merge_lora([adapter.path, adapter.path], tmp_path / "merged", weight=0.5).modules.keys()
