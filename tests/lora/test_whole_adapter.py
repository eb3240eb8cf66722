"""Adapters that do more than add products, merged into models: DoRA, whole tensors, biases, tokens, convolutions."""

import json

import pytest
import torch
from adapters import factors, random_adapter, save_adapter
from checkpoints import save
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_state_dicts, verify_output
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import AdapterRefusedError, CheckpointError, PickleRefusedError, ShapeError
from r_tsvm_kernels.lora import Adapter, WholeAdapter
from r_tsvm_kernels.lora.adapter import plain_names
from r_tsvm_kernels.lora_tools import resize_lora

PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (30, 16), "layers.0.q.weight": (24, 16), "layers.0.q.bias": (24,),
    "layers.0.norm.weight": (16,), "layers.0.conv.weight": (8, 4, 3, 3), "lm_head.weight": (30, 16),
}  # fmt: skip
BASE = {name: torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, (name, s) in enumerate(SHAPES.items())}


def draw(*shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dora(scale, transposed=False):
    A, B = factors((16, 24) if transposed else (24, 16), 4, 0)
    weight = (BASE["layers.0.q.weight"].mT if transposed else BASE["layers.0.q.weight"]).double()
    magnitude = draw(len(weight)).abs() + 0.5
    tuned = weight + scale * B.double() @ A.double()
    tuned = magnitude.double()[:, None] * tuned / tuned.norm(dim=1, keepdim=True)
    return (A, B), magnitude, tuned.mT if transposed else tuned


def case(kind):
    """Return modules, tensors and settings of an adapter, and the tuned weights."""
    A, B = factors((24, 16), 4, 0)
    plain = {"layers.0.q.weight": BASE["layers.0.q.weight"].double() + 2 * B.double() @ A.double()}
    modules = {"layers.0.q": (A, B)}
    if kind.startswith("dora"):
        turned = kind == "dora, stored (in, out)"
        modules["layers.0.q"], magnitude, tuned = dora(2, turned)
        settings = {"use_dora": True, "fan_in_fan_out": turned}
        return modules, {f"{PREFIX}layers.0.q.lora_magnitude_vector": magnitude}, settings, {"layers.0.q.weight": tuned}
    if kind == "modules to save":
        head, norm = draw(30, 16), draw(16)
        stored = {f"{PREFIX}lm_head.weight": head, f"{PREFIX}layers.0.norm.weight": norm}
        changed = {"lm_head.weight": head.double(), "layers.0.norm.weight": norm.double()}
        return modules, stored, {"modules_to_save": ["lm_head", "norm"]}, plain | changed
    if kind == "bias":
        bias = draw(24)
        changed = {"layers.0.q.bias": bias.double()}
        return modules, {f"{PREFIX}layers.0.q.base_layer.bias": bias}, {"bias": "lora_only"}, plain | changed
    if kind.startswith("tokens"):
        rows, embedding = draw(2, 16), BASE["model.embed_tokens.weight"].double().clone()
        embedding[[3, 7]] = rows.double()
        stored = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
        indices = [3, 7] if kind == "tokens" else {"embed_tokens": [3, 7]}
        return modules, stored, {"trainable_token_indices": indices}, plain | {"model.embed_tokens.weight": embedding}
    A, B = draw(4, 4, 3, 3), draw(8, 4, 1, 1)
    stored = {f"{PREFIX}layers.0.conv.lora_{x}.weight": factor for x, factor in (("A", A), ("B", B))}
    update = torch.einsum("orij,rckl->ockl", B.double(), A.double())
    changed = {"layers.0.conv.weight": BASE["layers.0.conv.weight"].double() + 2 * update}
    return modules, stored, {}, plain | changed


KINDS = ["dora", "dora, stored (in, out)", "modules to save", "bias", "tokens", "tokens by name", "convolution"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tuned_weights(tmp_path, kind):
    modules, stored, settings, expected = case(kind)
    base = save(tmp_path / "base", BASE)
    adapter = save_adapter(tmp_path / "adapter", modules, stored, **settings)
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=base, models=[adapter]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in BASE.items():
        torch.testing.assert_close(merged[name].double(), expected.get(name, tensor.double()), rtol=1e-5, atol=1e-5)
        assert name in expected or torch.equal(merged[name], tensor)
    assert verify_output(tmp_path / "out", inputs=True).ok
    changed = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t + 1 if n in stored else t for n, t in changed.items()}, adapter / "adapter_model.safetensors")
    assert verify_output(tmp_path / "out", inputs=True).inputs_changed


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "ties"])
def test_beside_plain_adapters_and_models(tmp_path, method):
    base = save(tmp_path / "base", BASE)
    adapters, tuned = [], []
    for kind in ("dora", "modules to save", "convolution"):
        modules, stored, settings, expected = case(kind)
        adapters.append(save_adapter(tmp_path / kind, modules, stored, **settings))
        tuned.append({name: expected.get(name, t.double()).float() for name, t in BASE.items()})
    other = save(tmp_path / "other", {name: t + 0.1 * draw(*t.shape) for name, t in BASE.items()})
    config = MergeConfig(method, base_model=base, models=[*adapters, other])
    merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = merge_state_dicts(BASE, [*tuned, load_file(other / "model.safetensors")], method).state_dict
    for name in BASE:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-4, atol=1e-4)


def test_names_in_checkpoints_of_a_training(tmp_path, capsys):
    base = save(tmp_path / "base", BASE)
    modules, stored, settings, _ = case("modules to save")
    plain = save_adapter(tmp_path / "plain", modules, stored, **settings)
    tensors = load_file(plain / "adapter_model.safetensors")
    infixed = {
        name.replace(".lora_A.weight", ".lora_A.math.weight").replace(".lora_B.weight", ".lora_B.math.weight")
        .replace("lm_head.weight", "lm_head.modules_to_save.math.weight"): t for name, t in tensors.items()
    }  # fmt: skip
    named = save_adapter(tmp_path / "named", {}, infixed, **(settings | {"r": 4, "lora_alpha": 8}))
    pickled = save_adapter(tmp_path / "pickled", modules, stored, **settings)
    torch.save(tensors, pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    outputs = []
    for adapter in (plain, named, pickled):
        arguments = ["merge", "--base", str(base), "--model", str(adapter), "--method", "linear"]
        assert main([*arguments, "--allow-pickle", str(tmp_path / f"out{len(outputs)}")]) == 0
        outputs.append(load_file(tmp_path / f"out{len(outputs)}" / "model.safetensors"))
    assert all(torch.equal(other[name], outputs[0][name]) for other in outputs for name in BASE)
    assert verify_output(tmp_path / "out2", inputs=True, allow_pickle=True).ok
    with pytest.raises(PickleRefusedError, match="--allow-pickle"):
        merge_checkpoints(MergeConfig("linear", base_model=base, models=[pickled]), tmp_path / "refused")
    with pytest.raises(AdapterRefusedError, match="several adapters: code, math"):
        plain_names([f"{PREFIX}q.lora_A.{name}.weight" for name in ("math", "code")], "file")


Q = {"layers.0.q": factors((24, 16), 4, 0)}


@pytest.mark.parametrize(
    ("modules", "stored", "settings", "error", "message"),
    [
        (Q, {}, {"use_dora": True}, CheckpointError, "use_dora is set, but layers.0.q has no"),
        (Q, {}, {"modules_to_save": ["lm_head"]}, CheckpointError, "modules_to_save has lm_head"),
        (Q, {}, {"trainable_token_indices": [1]}, CheckpointError, "holds no tokens"),
        ({}, {"layers.0.q.lora_magnitude_vector": draw(24)}, {"use_dora": True}, CheckpointError, "lacks a factor"),
        (Q, {"layers.0.q.lora_magnitude_vector": draw(3)}, {"use_dora": True},
         AdapterRefusedError, "and .3,. magnitudes"),
        (Q, {"lm_head.weight": draw(30, 16)}, {}, AdapterRefusedError, "whole tensors"),
        (Q, {"lm_head.weight": draw(31, 16)}, {"modules_to_save": ["lm_head"]},
         ShapeError, "lm_head"),
        (Q, {"layers.0.q.weight": draw(24, 16)}, {"modules_to_save": ["q"]},
         AdapterRefusedError, "in two ways"),
        ({}, {"model.embed_tokens.token_adapter.trainable_tokens_delta": draw(2, 16)}, {"trainable_token_indices": [3]},
         CheckpointError, "2 trained tokens, the config 1"),
        ({}, {f"layers.0.conv.lora_{x}.weight": draw(n, 4, 3, 3) for x, n in (("A", 4), ("B", 8))}, {"r": 4},
         AdapterRefusedError, "expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, modules, stored, settings, error, message):
    base = save(tmp_path / "base", BASE)
    adapter = save_adapter(tmp_path / "a", modules, {PREFIX + name: t for name, t in stored.items()}, **settings)
    with pytest.raises(error, match=message):
        merge_checkpoints(MergeConfig("linear", base_model=base, models=[adapter]), tmp_path / "out")


def test_tools_that_write_adapters_refuse_them(tmp_path):
    modules, stored, settings, _ = case("dora")
    adapter = save_adapter(tmp_path / "a", modules, stored, **settings)
    assert WholeAdapter(adapter).changes.keys() == {"layers.0.q.weight"}
    with pytest.raises(AdapterRefusedError, match="use_dora"):
        resize_lora(adapter, tmp_path / "out", rank=2)
    plain = random_adapter(tmp_path / "plain", 0)
    assert WholeAdapter(plain).modules == Adapter(plain).modules and not WholeAdapter(plain).changes
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["use_dora"]


EXPERTS = "model.layers.0.mlp.experts"


def expert_model(transposed, square=False):
    """Packed experts with gate and up fused, stored (E, in, out) or (E, out, in), and a router."""
    width, inner = (12, 12) if square else (12, 10)
    up, down = ((3, width, 2 * inner), (3, inner, width)) if transposed else ((3, 2 * inner, width), (3, width, inner))
    names = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", "model.layers.0.mlp.router.weight"
    return {
        name: draw(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, (up, down, (3, width)), strict=True))
    }


def expert_factors(inputs, outputs, rank, seed):
    """A of (E r, in) and B of (out, r E), and the sums of products (E, out, in)."""
    A, B = draw(3 * rank, inputs, seed=seed), draw(outputs, rank * 3, seed=seed + 1)
    updates = torch.einsum("fre,eri->efi", B.view(outputs, rank, 3).double(), A.view(3, rank, inputs).double())
    return A, B, updates


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_packed_experts_and_routers(tmp_path, transposed, square):
    tensors = expert_model(transposed, square)
    width, inner = (12, 12) if square else (12, 10)
    up, down = expert_factors(width, 2 * inner, 2, 1), expert_factors(inner, width, 2, 3)
    router = draw(2, width, seed=5), draw(3, 2, seed=6)
    stored = {
        f"{PREFIX}{module}.lora_{x}.weight": factor
        for module, pair in ((f"{EXPERTS}.base_layer", down), (EXPERTS, up), ("model.layers.0.mlp.router", router))
        for x, factor in zip("AB", pair[:2], strict=True)
    }
    settings = {"r": 2, "lora_alpha": 6, "target_parameters": [*tensors]}
    base = save(tmp_path / "base", tensors)
    adapter = save_adapter(tmp_path / "a", {}, stored, **settings)
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=base, models=[adapter]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    updates = [up[2], down[2], router[1].double() @ router[0].double()]
    for (name, start), update in zip(tensors.items(), updates, strict=True):
        update = update.mT if transposed and update.ndim == 3 else update
        torch.testing.assert_close(merged[name].double(), start.double() + 3 * update, rtol=1e-5, atol=1e-5)
    assert verify_output(tmp_path / "out", inputs=True).ok
    spectral = MergeConfig("iso_c", base_model=base, models=[adapter])
    result = merge_checkpoints(spectral, tmp_path / "spectral")
    assert len(result.reports[f"{EXPERTS}.down_proj"].blocks) == 3


def test_experts_that_do_not_fit(tmp_path):
    A, B, _ = expert_factors(12, 20, 2, 1)
    stored = {f"{PREFIX}{EXPERTS}.lora_A.weight": A, f"{PREFIX}{EXPERTS}.lora_B.weight": B}
    adapter = save_adapter(tmp_path / "a", {}, stored, r=2, target_parameters=["mlp.experts.gate_up_proj"])
    apart = save(tmp_path / "apart", {f"{EXPERTS}.0.up_proj.weight": torch.zeros(10, 12)})
    wider = save(tmp_path / "wider", {f"{EXPERTS}.gate_up_proj": torch.zeros(3, 13, 20)})
    more = save(tmp_path / "more", {f"{EXPERTS}.gate_up_proj": torch.zeros(4, 12, 20)})
    fits = save(tmp_path / "fits", {f"{EXPERTS}.gate_up_proj": torch.zeros(3, 12, 20)})
    for base, error, message in (
        (apart, CheckpointError, "one by one"),
        (wider, AdapterRefusedError, "no tensor fits"),
        (more, AdapterRefusedError, "no equal ranks for 4 experts"),
    ):
        with pytest.raises(error, match=message):
            merge_checkpoints(MergeConfig("linear", base_model=base, models=[adapter]), tmp_path / "out")
    merge_checkpoints(MergeConfig("linear", base_model=fits, models=[adapter]), tmp_path / "out")
