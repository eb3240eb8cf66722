"""LoRA adapters as models of a merge: as if PEFT had merged each into its base in float64."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from adapters import dense_updates, factors, random_adapter, save_adapter
from checkpoints import digest, save
from compare import relative_error, same_bits
from memory import measured
from safetensors.torch import load_file

from r_tsvm_kernels import AdapterRefusedError, CheckpointError, ConfigError, MergeConfig, ShapeError, merge_checkpoints
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import scheduling, smallest_schedule
from r_tsvm_kernels.engine.tiles import Tile, merge_tile, read_tile
from r_tsvm_kernels.engine.verify import verify_output
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.lora_tools import extract_lora
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.plan import make_plan

WEIGHTS = {"layers.0.q": (24, 16), "layers.0.up": (40, 16), "layers.1.q": (24, 16), "layers.1.up": (40, 16)}
FIRST = {"layers.0.q": (24, 16), "layers.0.up": (40, 16)}
SECOND = {"layers.0.q": (24, 16), "layers.1.q": (24, 16)}
UNTOUCHED = ("layers.1.up.weight", "norm.weight", "step")


def base_tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in WEIGHTS.items()}
    return tensors | {"norm.weight": torch.randn(16, generator=generator).to(dtype), "step": torch.tensor(3)}


def inputs(folder, dtype=torch.float32):
    """A base, two adapters that overlap in one weight, and the models that PEFT would make of them, in float64."""
    tensors = base_tensors(dtype)
    base = save(folder / "base", tensors)
    adapters = [
        random_adapter(folder / "a", 1, rank=3, shapes=FIRST, dtype=dtype),
        random_adapter(folder / "b", 2, rank=5, shapes=SECOND, dtype=dtype),
    ]
    return base, adapters, [peft_merged(tensors, adapter) for adapter in adapters]


def peft_merged(tensors, adapter):
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    return wide | {f"{name}.weight": wide[f"{name}.weight"] + d for name, d in dense_updates(adapter).items()}


def config_for(base, models, method="task_arithmetic", **fields):
    models = tuple({"model": str(model)} for model in models)
    return MergeConfig(merge_method=method, base_model=None if base is None else str(base), models=models, **fields)


def merged(config, out, **options):
    return load_file(merge_checkpoints(config, out, threads=1, **options).path / "model.safetensors")


METHODS_OF_TWO = sorted(name for name, method in METHODS.items() if method.tasks is None)
PLAIN = {"parameters": {"outlier_weighting": "none", "rank": "fixed"}}


@pytest.mark.parametrize("method", [*METHODS_OF_TWO, "rtsvm, plain"])
def test_merges_what_peft_would_make_of_them(tmp_path, method):
    base, adapters, models = inputs(tmp_path)
    fields = PLAIN if "plain" in method else {}
    method = method.partition(",")[0]
    exact_base = {name: t.double() if t.is_floating_point() else t for name, t in base_tensors().items()}
    dense = [save(tmp_path / name, tensors) for name, tensors in zip("xyz", (exact_base, *models), strict=True)]
    exact = merged(config_for(dense[0], dense[1:], method, **fields), tmp_path / "exact")
    got = merged(config_for(base, adapters, method, **fields), tmp_path / "out")
    start = load_file(base / "model.safetensors")
    for name, tensor in got.items():
        if name in UNTOUCHED and METHODS[method].forms_vectors(True):
            assert same_bits(tensor, start[name])
        elif tensor.is_floating_point():
            update = exact[name] - start[name].double()
            excess = (tensor.double() - exact[name]).norm() - 2**-23 * exact[name].norm()
            assert excess <= 1e-5 * update.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_nothing_is_rounded_before_the_end(tmp_path, dtype):
    base, adapters, models = inputs(tmp_path, dtype)
    got = merged(config_for(base, adapters, out_dtype="float32"), tmp_path / "out")
    for name, tensor in base_tensors(dtype).items():
        if tensor.is_floating_point():
            exact = models[0][name] + models[1][name] - tensor.double()
            assert relative_error(got[name], exact) < 1e-6


def test_notations(tmp_path, monkeypatch):
    base, adapters, _ = inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = digest(merge_checkpoints(config_for(base, adapters), "plain", threads=1).path)["model.safetensors"]
    paired = config_for("base", ["base+a", "./base+b"])
    assert digest(merge_checkpoints(paired, "paired").path)["model.safetensors"] == plain
    again = MergeConfig.from_yaml("paired/merge_recipe.yaml")
    assert digest(merge_checkpoints(again, "again").path)["model.safetensors"] == plain
    command = ["merge", "--base", "base", "--model", "a", "--model", "base+b", "--method", "task_arithmetic", "--quiet"]
    assert main([*command, "command"]) == 0
    assert digest(tmp_path / "command")["model.safetensors"] == plain
    (tmp_path / "base").rename(tmp_path / "b+ase")
    found = digest(merge_checkpoints(config_for("b+ase", ["b+ase+a", "b"]), "plus").path)
    assert found["model.safetensors"] == plain


def test_an_adapter_of_another_model(tmp_path):
    """Its task vector is the difference of the two models and the update."""
    base, (first, second), models = inputs(tmp_path)
    other = base_tensors(seed=9)
    save(tmp_path / "other", other)
    got = merged(config_for(base, [f"{tmp_path / 'other'}+{first}", second], "task_arithmetic"), tmp_path / "out")
    tuned = peft_merged(other, first)
    for name, tensor in base_tensors().items():
        if tensor.is_floating_point():
            assert relative_error(got[name], tuned[name] + models[1][name] - tensor.double()) < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_without_a_base(tmp_path, normalize):
    base, adapters, models = inputs(tmp_path)
    config = config_for(None, [f"{base}+{adapter}" for adapter in adapters], "linear")
    config = config.model_copy(update={"parameters": {"normalize": normalize}})
    got = merged(config, tmp_path / "out")
    for name in (*(f"{name}.weight" for name in WEIGHTS), "norm.weight"):
        exact = (models[0][name] + models[1][name]) / (2 if normalize else 1)
        assert relative_error(got[name], exact) < 1e-6
    with pytest.raises(ConfigError, match=r"write model\+adapter, or set base_model"):
        merge_checkpoints(config_for(None, adapters, "linear"), tmp_path / "no")


def test_names_without_the_prefix_of_the_model_class(tmp_path):
    base, _, _ = inputs(tmp_path)
    prefixed = random_adapter(tmp_path / "p", 3, shapes={"transformer.layers.0.q": (24, 16)})
    got = merged(config_for(base, [prefixed]), tmp_path / "out")
    (update,) = dense_updates(prefixed).values()
    assert relative_error(got["layers.0.q.weight"] - base_tensors()["layers.0.q.weight"], update) < 1e-5


def test_weights_that_are_stored_transposed(tmp_path):
    tensors = {"embed.weight": torch.randn(50, 8), "attn.weight": torch.randn(8, 12)}
    base = save(tmp_path / "base", tensors)
    modules = {"embed": factors((8, 50), 2, 0), "attn": factors((12, 8), 2, 1)}
    adapter = save_adapter(tmp_path / "a", modules, fan_in_fan_out=True)
    got = merged(config_for(base, [adapter], "tsvm"), tmp_path / "out")
    for name, update in dense_updates(adapter).items():
        assert relative_error(got[f"{name}.weight"] - tensors[f"{name}.weight"], update.mT) < 1e-5


@pytest.mark.parametrize("method", ["tsvm", "ties"])
def test_resumes_with_the_same_bytes(tmp_path, method):
    base, adapters, _ = inputs(tmp_path)
    config = config_for(base, adapters, method)
    whole = digest(merge_checkpoints(config, tmp_path / "whole").path)["model.safetensors"]

    def stop(progress):
        if progress.tensors_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", threads=1, progress=stop)
    result = merge_checkpoints(config, tmp_path / "out", threads=3, resume=True)
    assert result.resumed >= 3
    assert digest(result.path)["model.safetensors"] == whole


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_adapter_is_noticed(tmp_path, file):
    base, adapters, _ = inputs(tmp_path)
    config = config_for(base, adapters)

    def stop(progress):
        if progress.tensors_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", threads=1, progress=stop)
    os.utime(adapters[1] / file)
    with pytest.raises(CheckpointError, match=rf"the input \S+b/{file} changed"):
        merge_checkpoints(config, tmp_path / "out", resume=True)

    def touch(progress):
        os.utime(adapters[1] / file)

    with pytest.raises(CheckpointError, match=f"b/{file}: changed since"):
        merge_checkpoints(config, tmp_path / "out", threads=1, restart=True, progress=touch)


def test_verify_checks_the_factors(tmp_path):
    base, adapters, _ = inputs(tmp_path)
    merge_checkpoints(config_for(base, adapters), tmp_path / "out")
    assert verify_output(tmp_path / "out", inputs=True).ok
    file = adapters[1] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (changed,) = verify_output(tmp_path / "out", inputs=True).inputs_changed
    assert changed.startswith(f"{adapters[1]}: layers.")


def test_inspect(tmp_path, capsys):
    base, adapters, _ = inputs(tmp_path)
    command = ["inspect", "--base", str(base), "--model", str(adapters[0]), "--model", str(adapters[1])]
    assert main([*command, "--method", "tsvm", "--json", "--estimate-time"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["models"] == [str(adapter) for adapter in adapters]
    q, up = plan["tensors"]["layers.0.q.weight"], plan["tensors"]["layers.1.up.weight"]
    assert q["bytes_read"] == 4 * (24 * 16 + (3 + 5) * (24 + 16))
    assert (up["treatment"], up["reason"]) == ("base", "no adapter changes it")
    assert sum(file["bytes_read"] for file in plan["input_files"]) == plan["bytes_read"]
    assert {Path(file["path"]).name for file in plan["input_files"]} == {
        "model.safetensors", "adapter_model.safetensors",
    }  # fmt: skip
    assert main([*command, "--method", "ties"]) == 0
    assert "no adapter changes it" in capsys.readouterr().out


def test_memory_does_not_change_the_bytes(tmp_path, monkeypatch):
    """Rows of a product of factors are not merged separately: libraries would round them differently."""
    base, adapters, _ = inputs(tmp_path)
    config = config_for(base, adapters)
    monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (2**20, 1))
    smallest = smallest_schedule(make_plan(config, 10**9))
    assert smallest.tensors["layers.0.q.weight"].count == 1 and smallest.tensors["norm.weight"].count == 16
    found = {
        digest(merge_checkpoints(config, tmp_path / name, memory=memory).path)["model.safetensors"]
        for name, memory in (("small", smallest.peak_host_bytes), ("any", None))
    }
    assert len(found) == 1


MEMORY = """
from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.plan import footprint, make_plan
from r_tsvm_kernels.engine.tiles import Tile, merge_tile, read_tile

found, cpu = {}, torch.device("cpu")
for method in ("tsvm", "star", "knots", "core_space", "ties"):
    plan = make_plan(MergeConfig.from_dict(json.loads(sys.argv[1]) | {"merge_method": method}), 10**9)
    tile = Tile("q.weight", 0, 1, 0, 1200)
    given = read_tile(plan, tile)
    merge_tile(plan, tile, given, cpu)  # loads libraries, whose buffers are counted with the worker
    start()
    merge_tile(plan, tile, given, cpu)
    found[method] = plan.keeps_factors("q.weight"), _status("VmHWM") - before, footprint(plan, "q.weight").work
report(found=found)
"""


def test_memory_stays_below_the_plan(tmp_path):
    shapes = {"q": (1200, 900)}
    base = save(tmp_path / "base", {"q.weight": torch.randn(1200, 900).bfloat16()})
    adapters = [random_adapter(tmp_path / name, seed, 16, shapes=shapes) for seed, name in enumerate("ab")]
    recipe = {"base_model": str(base), "models": [{"model": str(path)} for path in adapters]}
    for method, (kept, growth, planned) in measured(MEMORY, json.dumps(recipe))["found"].items():
        assert kept == (method != "ties")
        assert growth <= planned + (4 << 20), method  # threads, caches of libraries


def test_no_task_matrix_is_formed(tmp_path, monkeypatch):
    base, adapters, _ = inputs(tmp_path)
    monkeypatch.setattr("r_tsvm_kernels.values.base_plus", None)
    for method in ("tsvm", "iso_c", "star", "linear", "task_arithmetic"):
        merge_checkpoints(config_for(base, adapters, method), tmp_path / method)


def test_a_plan_travels_to_workers(tmp_path):
    base, adapters, _ = inputs(tmp_path)
    plan = make_plan(config_for(base, [*adapters, adapters[0]], "tsvm"), 10**9)
    tile = Tile("layers.0.q.weight", 0, 1, 0, 24)
    there = pickle.loads(pickle.dumps(plan))
    results = [merge_tile(p, tile, read_tile(p, tile), torch.device("cpu")).weight for p in (plan, there)]
    assert same_bits(*results) and len(there.inputs) == 3
    assert isinstance(read_tile(there, tile)[1], Factored)


def test_what_does_not_fit_is_refused(tmp_path):
    base, (first, _), _ = inputs(tmp_path)

    def refused(error, match, model=first, base_model=base):
        with pytest.raises(error, match=match):
            merge_checkpoints(config_for(base_model, [model]), tmp_path / "out")

    refused(ShapeError, r"the update of layers.0.q.weight has shape \(24, 8\).*belongs to another model",
            random_adapter(tmp_path / "wide", 0, shapes={"layers.0.q": (24, 8)}))  # fmt: skip
    refused(CheckpointError, "changes lm_head.weight, which .* does not have; it is tied",
            random_adapter(tmp_path / "head", 0, shapes={"lm_head": (24, 8)}))  # fmt: skip
    refused(CheckpointError, "changes layers.7.q.weight, .* trained on some/base",
            random_adapter(tmp_path / "more", 0, shapes={"layers.7.q": (24, 16)}))  # fmt: skip
    refused(CheckpointError, "use_dora is set, but", random_adapter(tmp_path / "dora", 0, shapes=FIRST, use_dora=True))
    refused(ConfigError, r"base_model: \S+a is a LoRA adapter", base_model=first)
    refused(ConfigError, r"expected a model, or model\+adapter", "a+b+c")
    with pytest.raises(ConfigError, match="is a LoRA adapter already"):
        extract_lora(str(base), str(first), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "no adapter_config.json", f"{base}+{tmp_path / 'empty'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_the_base_in_an_adapter(tmp_path, dtype):
    """PEFT stores the weight of an embedding beside its factors."""
    weight = torch.randn(50, 8)
    base = save(tmp_path / "base", {"embed.weight": weight})

    def adapter_with(name, copy):
        stored = {"base_model.model.embed.base_layer.weight": copy}
        return save_adapter(tmp_path / name, {"embed": factors((8, 50), 2, 0)}, stored)

    adapter = adapter_with("same", weight.to(dtype))
    got = merged(config_for(base, [adapter]), tmp_path / "out")
    (update,) = dense_updates(adapter).values()
    assert relative_error(got["embed.weight"] - weight, update.mT) < 1e-5
    for other in (weight.to(dtype) + 1, weight[:40].to(dtype)):
        with pytest.raises(CheckpointError, match=r"copy of the base weight embed.weight differs from \S+base"):
            merge_checkpoints(config_for(base, [adapter_with(f"other{len(other)}", other)]), tmp_path / "no")


def test_copies_of_tied_tensors_in_an_adapter(tmp_path):
    """PEFT stores a trained bias under each of its names (BERT's head), a base under one of them."""
    base = save(tmp_path / "base", base_tensors() | {"head.bias": torch.zeros(9)})
    names, bias = ("head.bias", "head.decoder.bias"), torch.randn(9)

    def adapter_with(name, *values):
        stored = {f"base_model.model.{own}": value for own, value in zip(names, values, strict=True)}
        return save_adapter(tmp_path / name, {"layers.0.q": factors((24, 16), 2, 0)}, stored, bias="all")

    got = merged(config_for(base, [adapter_with("tied", bias, bias.clone())]), tmp_path / "out")
    assert torch.equal(got["head.bias"], bias) and names[1] not in got
    with pytest.raises(CheckpointError, match=r"changes head\.decoder\.bias, which \S+base does not have"):
        merged(config_for(base, [adapter_with("untied", bias, bias + 1)]), tmp_path / "no")


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"architectures": ["GemmaForCausalLM"]}, {}])
def test_an_embedding_without_the_head_that_is_tied_to_it(tmp_path, config):
    """PEFT trains a copy of the embedding beside the head of the base, unless it is told to tie them."""
    name = "model.embed_tokens.weight"
    base = save(tmp_path / "base", base_tensors() | {name: torch.zeros(9, 4)}, config=config)

    def adapter_with(folder, *names, **settings):
        stored = {f"base_model.model.{own}": torch.ones(9, 4) for own in names}
        factors_of_one = {"layers.0.q": factors((24, 16), 2, 0)}
        return save_adapter(tmp_path / folder, factors_of_one, stored, modules_to_save=["embed_tokens"], **settings)

    alone = adapter_with("alone", name)
    if config:
        with pytest.raises(AdapterRefusedError, match=r"would change the output head, too\. Merge"):
            merged(config_for(base, [alone]), tmp_path / "no")
    kept = [adapter_with("told", name, ensure_weight_tying=True), adapter_with("both", name, "lm_head.weight")]
    for number, adapter in enumerate(kept if config else [alone]):
        assert torch.equal(merged(config_for(base, [adapter]), tmp_path / str(number))[name], torch.ones(9, 4))


def test_ranks_that_differ_between_modules(tmp_path):
    base, _, _ = inputs(tmp_path)
    modules = {"layers.0.q": factors((24, 16), 2, 0), "layers.0.up": factors((40, 16), 6, 1)}
    adapter = save_adapter(tmp_path / "c", modules, use_rslora=True, lora_alpha=3)
    got = merged(config_for(base, [adapter], "iso_c"), tmp_path / "out")
    for name, update in dense_updates(adapter).items():
        left, values, right = torch.linalg.svd(update)
        rank = len(modules[name][0])
        exact = values.sum() / min(update.shape) * left[:, :rank] @ right[:rank]
        assert relative_error(got[f"{name}.weight"] - base_tensors()[f"{name}.weight"], exact) < 1e-5
