import json
import math
import re

import pytest
import torch
from adapters import dense_updates
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import CheckpointError, ConfigError, NonFiniteError, OutputExistsError, OutputUnfinishedError
from r_tsvm_kernels.lora import Adapter
from r_tsvm_kernels.lora_tools import extract_lora

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.q.weight": (16, 16),
    "model.layers.0.up.weight": (32, 16),
    "model.layers.0.same.weight": (8, 16),
    "model.norm.weight": (16,),
    "model.table": (4, 4),
    "lm_head.weight": (50, 16),
}


@pytest.fixture
def models(tmp_path):
    """A base, and a fine-tune with changes of rank 3 and a little noise in all tensors except `same`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    base = {name: draw(*shape) for name, shape in SHAPES.items()} | {"ids": torch.arange(5)}
    tuned = {name: t.clone() for name, t in base.items()}
    for name, shape in SHAPES.items():
        if "same" not in name:
            tuned[name] += draw(shape[0], 3) @ draw(3, shape[1]) if len(shape) == 2 else 1.0
            tuned[name] += 1e-3 * draw(*shape)
    config = {"architectures": ["ToyForCausalLM"]}
    save(tmp_path / "base", base, config=config)
    save(tmp_path / "tuned", tuned, shards=2, config=config)
    deltas = {name: tuned[name].double() - base[name].double() for name in SHAPES}
    return tmp_path, deltas


def extract(folder, **options):
    result = extract_lora(str(folder / "base"), str(folder / "tuned"), folder / "out", **options)
    return result, dense_updates(result.path), json.loads(result.report_path.read_text())


def best(delta, rank):
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank], values


@pytest.mark.parametrize("rank", [1, 3, 10, 100])
def test_each_update_is_the_best_of_its_rank(models, rank):
    folder, deltas = models
    result, updates, report = extract(folder, rank=rank)
    assert set(updates) == {"model.layers.0.q", "model.layers.0.up"}
    for module, update in updates.items():
        expected, values = best(deltas[f"{module}.weight"], rank)
        assert torch.linalg.vector_norm(update - expected) < 2e-6 * torch.linalg.vector_norm(values)
        found = report["modules"][module]
        assert found["rank"] == min(rank, 16)
        assert found["captured_energy"] == pytest.approx(float((expected.norm() / values.norm()) ** 2), rel=1e-6)
        assert found["norm"] == pytest.approx(float(values.norm()), rel=1e-6)
    assert report["modules"]["model.layers.0.same"]["rank"] == 0
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    kept = sum(float(best(deltas[f"{module}.weight"], rank)[0].square().sum()) for module in updates)
    assert result.captured_energy == report["captured_energy"] == pytest.approx(kept / whole, rel=1e-6)


def test_rules_choose_the_rank(models):
    folder, deltas = models
    _, _, report = extract(folder, noise=True)
    assert {module["rank"] for module in report["modules"].values()} == {3, 0}
    (folder / "out").rename(folder / "before")
    _, _, report = extract(folder, energy=0.9)
    for name in ("model.layers.0.q", "model.layers.0.up"):
        share = best(deltas[f"{name}.weight"], 0)[1].square().cumsum(0)
        assert report["modules"][name]["rank"] == int((share < 0.9 * share[-1]).sum()) + 1
    (folder / "out").rename(folder / "before2")
    assert {module["rank"] for module in extract(folder, noise=True, rank=2)[2]["modules"].values()} == {2, 0}


def test_what_is_left_out_is_told(models):
    folder, deltas = models
    result, _, report = extract(folder, exclude=["*.up.*"])
    reasons = {name: tensor["reason"].split()[0] for name, tensor in report["left_out"].items()}
    assert reasons == {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "embedding", "model.norm.weight": "1-D:",
        "model.table": "not", "model.layers.0.up.weight": "excluded", "ids": "int64",
    }  # fmt: skip
    for name in reasons:
        expected = float(deltas[name].norm()) if name in deltas else 0.0
        assert result.left_out[name].norm == pytest.approx(expected)


def test_embeddings_when_asked_for(models):
    folder, deltas = models
    _, updates, _ = extract(folder, embed_lora=True, rank=16)
    embedding, head = updates["model.embed_tokens"], updates["lm_head"]
    assert torch.allclose(embedding, deltas["model.embed_tokens.weight"].mT, atol=1e-5)
    assert torch.allclose(head, deltas["lm_head.weight"], atol=1e-5)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {}], ids=["in the config", "no head is stored"])
def test_tied_embeddings_are_left_out(tmp_path, config):
    torch.manual_seed(0)
    base = {"embed_tokens.weight": torch.randn(9, 4), "q.weight": torch.randn(4, 4)}
    save(tmp_path / "base", base, config=config | {"model_type": "toy"})
    save(tmp_path / "tuned", {name: 2 * t for name, t in base.items()}, config=config)
    result, updates, _ = extract(tmp_path, embed_lora=True)
    assert set(updates) == {"q"} and "tied to the output head" in result.left_out["embed_tokens.weight"].reason


def test_weights_stored_in_out(models):
    folder, deltas = models
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    _, updates, _ = extract(folder, embed_lora=True, rank=16)
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert torch.allclose(updates["model.layers.0.up"], deltas["model.layers.0.up.weight"].mT, atol=1e-5)
    assert torch.allclose(updates["lm_head"], deltas["lm_head.weight"], atol=1e-5)


def test_config(models):
    folder, _ = models
    extract(folder, rank=4, out_dtype="bfloat16")
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == str(folder / "base")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})


def test_pieces_of_rows_give_the_same(models, monkeypatch):
    folder, _ = models
    _, expected, whole = extract(folder, rank=4)
    (folder / "out").rename(folder / "whole")
    monkeypatch.setattr("r_tsvm_kernels.lora_tools.extract._PIECE_BYTES", 3 * 16 * 4)
    _, updates, report = extract(folder, rank=4)
    assert all(torch.equal(updates[module], expected[module]) for module in expected)
    for name, tensor in whole["left_out"].items():
        assert report["left_out"][name]["norm"] == pytest.approx(tensor["norm"])


def test_nothing_is_left_behind_by_a_failure(models):
    folder, _ = models
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="no module is changed"):
        extract_lora(str(folder / "base"), str(folder / "tuned"), folder / "out", include=["*.same.*"])
    with pytest.raises(ConfigError, match="no fine-tuned models"):
        extract_lora(str(folder / "base"), str(folder / "base"), folder / "out")
    with pytest.raises(ConfigError, match="energy"):
        extract(folder, energy=2.0)
    with pytest.raises(ConfigError, match="is a folder"):
        extract_lora(str(folder / "base"), str(folder / "tuned"), folder / "out.safetensors")
    with pytest.raises(OutputExistsError):
        extract_lora(str(folder / "base"), str(folder / "tuned"), folder / "base")
    assert sorted(folder.iterdir()) == before
    (folder / ".out.partial").mkdir()
    (folder / ".out.partial" / "merge_journal.jsonl").touch()
    with pytest.raises(OutputUnfinishedError):
        extract(folder)
    assert (folder / ".out.partial" / "merge_journal.jsonl").exists()


def test_broken_values_are_named(models):
    folder, _ = models
    save(folder / "nan", {"a.weight": torch.full((4, 4), torch.nan)})
    save(folder / "zero", {"a.weight": torch.zeros(4, 4)})
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        extract_lora(str(folder / "zero"), str(folder / "nan"), folder / "out")
    for name, shape in (("a.weight", (4, 4)), ("a.norm", (4,))):  # the second is left out of the adapter, not unseen
        bad = math.nan if name == "a.norm" else -3e38
        save(folder / f"{name}-far", {name: torch.full(shape, bad), "b.weight": torch.ones(4, 4)})
        save(folder / f"{name}-here", {name: torch.full(shape, 3e38), "b.weight": torch.zeros(4, 4)})
        with pytest.raises(NonFiniteError, match=rf"{name}: .*differ by more than their dtype holds"):
            extract_lora(str(folder / f"{name}-here"), str(folder / f"{name}-far"), folder / "out")
    assert not (folder / "out").exists()


def test_command(models, capsys):
    folder, _ = models
    command = ["extract-lora", "--base", str(folder / "base"), "--model", str(folder / "tuned"), "--rank", "3"]
    assert main([*command, str(folder / "out")]) == 0
    captured = capsys.readouterr()
    report = json.loads((folder / "out" / "lora_report.json").read_text())
    least = min(module["captured_energy"] for module in report["modules"].values())
    assert least == report["least_captured_energy"] > 0.999
    assert "2 modules of rank 3, at least 99.9 % of the energy of each, in " in captured.out
    norms = {name: tensor["norm"] ** 2 for name, tensor in report["left_out"].items()}
    whole = sum(norms.values()) + sum(module["norm"] ** 2 for module in report["modules"].values())
    assert report["left_out_energy"] == pytest.approx(sum(norms.values()) / whole)
    heads = [norms[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    shares = [100 * sum(x) / whole for x in (norms.values(), heads)]
    found = re.findall(r"(\d+\.\d) %", captured.out)
    assert [float(found[1]), float(found[2])] == pytest.approx(shares, abs=0.1)
    assert "in 2 tensors: embedding or output head; adapted with --embed-lora" in captured.out
    assert "in 1 tensor: 1-D: LoRA adapts matrices" in captured.out and "same" not in captured.out
    assert "8/8 tensors" in captured.err
    assert main([*command, str(folder / "out")]) == 2
    assert "a finished adapter is there" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"rank": 8}, {"energy": 0.9}], ids=str)
def test_experts_and_routers_have_one_rank(tmp_path, options):
    """PEFT stacks the factors of experts over transformers 5, and gives routers the common rank."""
    generator = torch.Generator().manual_seed(0)
    place = "model.layers.0.mlp"
    shapes = {f"{place}.experts.{i}.{n}.weight": (12, 16) for i in range(3) for n in ("up_proj", "gate_proj")}
    shapes |= {f"{place}.gate.weight": (3, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = {name: t + torch.randn(t.shape, generator=generator) for name, t in base.items()}
    still = f"{place}.experts.2.up_proj.weight"
    tuned[still] = base[still]
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    _, updates, _ = extract(tmp_path, **options)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {name: len(t) for name, t in factors.items() if "lora_A" in name and "mlp" in name}
    assert len(ranks) == 7 and len(set(ranks.values())) == 1
    assert not updates[still.removesuffix(".weight")].any()
    for name, delta in ((n, tuned[n].double() - base[n].double()) for n in shapes if n != still):
        least = (delta - best(delta, 8)[0]).norm() if "rank" in options else 0.1**0.5 * delta.norm()
        assert (updates[name.removesuffix(".weight")] - delta).norm() <= 1.0001 * least + 1e-5
    assert Adapter(tmp_path / "out").modules.keys() == {name.removesuffix(".weight") for name in shapes}


def test_experts_that_nobody_changed_are_not_written(tmp_path):
    base = {"mlp.experts.0.up_proj.weight": torch.randn(4, 4), "q.weight": torch.randn(4, 4)}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", {**base, "q.weight": base["q.weight"] + 1})
    assert set(extract(tmp_path, rank=2)[1]) == {"q"}


def test_modules_that_peft_does_not_adapt_are_left_out(tmp_path):
    base = {f"backbone.layers.0.mixer.{name}.weight": torch.zeros(4, 4) for name in ("router", "out_proj")}
    for model_type, count in (("mamba", 1), ("gpt_oss", 1), ("llama", 2)):
        folder = tmp_path / model_type
        save(folder / "base", base, config={"model_type": model_type})
        save(folder / "tuned", {name: t + torch.eye(4) for name, t in base.items()})
        result, updates, _ = extract(folder, rank=2)
        assert len(updates) == count and len(result.left_out) == 2 - count


def test_embeddings_of_positions_are_adapted_as_embeddings(tmp_path):
    """PEFT ignores factors of a linear layer for them without a word."""
    names = "decoder.embed_positions", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    base = {f"{name}.weight": torch.zeros(6, 4) for name in names}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", {name: t + torch.eye(6, 4) for name, t in base.items()})
    extract_lora(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=2, embed_lora=True)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name for name in factors if "lora_embedding_A" in name} == {
        f"base_model.model.{name}.lora_embedding_A" for name in names
    }
