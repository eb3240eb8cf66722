import json

import pytest
import torch
from adapters import SHAPES, dense_updates, factors, random_adapter, save_adapter
from compare import relative_error

from r_tsvm_kernels.errors import (
    AdapterRefusedError,
    CheckpointError,
    InputChangedError,
    NonFiniteError,
    PickleRefusedError,
)
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.lora import Adapter, AdapterWriter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_reads_factors_and_scales(tmp_path, dtype, rslora):
    adapter = Adapter(random_adapter(tmp_path / "a", 0, dtype=dtype, use_rslora=rslora, lora_alpha=6))
    assert list(adapter.modules) and set(adapter.modules) == set(SHAPES)
    for module, expected in dense_updates(tmp_path / "a").items():
        matrix = adapter.load(module)
        assert matrix.left.dtype == dtype and matrix.scale == 6 / (2.0 if rslora else 4)
        assert adapter.modules[module].weight_name == f"{module}.weight"
        assert adapter.modules[module].shape == SHAPES[module]
        assert relative_error(matrix.left.double() @ matrix.right.double() * matrix.scale, expected) < 1e-12


def test_patterns_match_the_end_of_a_name_and_the_first_counts(tmp_path):
    modules = {"layers.0.q": factors((8, 6), 2, 0), "layers.1.q": factors((8, 6), 3, 1), "k": factors((8, 6), 4, 2)}
    patterns = {"rank_pattern": {r"layers\.0\.q": 2, "q": 3, "layers.1.q": 9}, "alpha_pattern": {"^k": 5}}
    adapter = Adapter(save_adapter(tmp_path / "a", modules, r=4, lora_alpha=6, **patterns))
    assert {name: (module.rank, module.scale) for name, module in adapter.modules.items()} == {
        "layers.0.q": (2, 3.0), "layers.1.q": (3, 2.0), "k": (4, 1.25),
    }  # fmt: skip


def test_weights_of_embeddings_and_of_conv1d_are_transposed(tmp_path):
    modules = {"wte.embed": factors((6, 30), 2, 0), "attn": factors((12, 8), 2, 1), "lm_head": factors((30, 6), 2, 2)}
    save_adapter(tmp_path / "a", modules, fan_in_fan_out=True)
    adapter, dense = Adapter(tmp_path / "a"), dense_updates(tmp_path / "a")
    for module, transposed in {"wte.embed": True, "attn": True, "lm_head": False}.items():
        expected = dense[module].mT if transposed else dense[module]
        assert relative_error(adapter.task_matrix(module).dense(), expected) < 1e-6
        assert relative_error(adapter.load(module).dense(), dense[module]) < 1e-6


def test_what_is_written_reads_back(tmp_path):
    torch.manual_seed(0)
    updates = {
        "a.q": Factored(torch.randn(8, 3), torch.randn(3, 5), 0.7),
        "q": Factored(torch.randn(8, 2), torch.randn(2, 5), 2.0),
        "embed": Factored(torch.randn(8, 2), torch.randn(2, 50)),
        "unchanged": Factored(torch.zeros(8, 0), torch.zeros(0, 5)),
    }
    with AdapterWriter(tmp_path, torch.float32) as writer:
        for module, matrix in updates.items():
            writer.add(module, matrix, embedding=module == "embed")
        writer.finish(base="some/base", task_type="CAUSAL_LM")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    adapter = Adapter(tmp_path)
    assert set(adapter.modules) == {"a.q", "q", "embed"} and adapter.modules["embed"].embedding
    for module, found in adapter.modules.items():
        matrix = adapter.load(module)
        assert torch.equal(matrix.left, updates[module].left) and torch.equal(matrix.right, updates[module].right)
        assert found.scale == pytest.approx(updates[module].scale, rel=1e-15)


def test_equal_ranks_need_no_patterns(tmp_path):
    with AdapterWriter(tmp_path, torch.bfloat16) as writer:
        for module in ("b", "a"):
            writer.add(module, Factored(torch.ones(8, 3), torch.ones(3, 5)))
        writer.finish(base=None, task_type=None, fan_in_fan_out=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    assert config["target_modules"] == ["a", "b"] and config["fan_in_fan_out"]
    assert Adapter(tmp_path).load("a").left.dtype == torch.bfloat16


def test_nothing_to_write(tmp_path):
    with AdapterWriter(tmp_path, torch.float32) as writer:
        writer.add("q", Factored(torch.zeros(8, 0), torch.zeros(0, 5)))
        with pytest.raises(CheckpointError, match="no module is changed"):
            writer.finish(base=None, task_type=None)


def test_what_does_not_fit_the_dtype_is_refused(tmp_path):
    with (
        AdapterWriter(tmp_path, torch.float16) as writer,
        pytest.raises(NonFiniteError, match="q: the factors of the update do not fit float16"),
    ):
        writer.add("q", Factored(torch.full((2, 1), 1e5), torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is set: DoRA"),
        ({"use_something": True}, "use_something is set: unknown here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"target_parameters": ["experts"]}, "bare parameters"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
    ],
    ids=str,
)
def test_refused_settings(tmp_path, setting, error):
    with pytest.raises(AdapterRefusedError, match=error):
        Adapter(random_adapter(tmp_path / "a", 0, **setting))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("base_model.model.layers.0.q.lora_magnitude_vector.weight", "DoRA"),
        ("base_model.model.lm_head.weight", "modules_to_save"),
        ("base_model.model.mlp.base_layer.lora_B.weight", "lacks the other factor"),
        ("layers.9.q.lora_A.weight", "not a factor"),
    ],
)
def test_refused_tensors(tmp_path, name, error):
    save_adapter(tmp_path / "a", {"q": factors((8, 6), 2, 0)}, tensors={name: torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=error):
        Adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "setting", [{"r": 0}, {"lora_alpha": "many"}, {"rank_pattern": {"(": 2}}, {"alpha_pattern": [1]}], ids=str
)
def test_invalid_configs(tmp_path, setting):
    with pytest.raises(CheckpointError, match="not a valid LoRA config"):
        Adapter(random_adapter(tmp_path / "a", 0, **setting))


def test_other_damage(tmp_path):
    with pytest.raises(CheckpointError, match="says 5"):
        Adapter(random_adapter(tmp_path / "a", 0, r=5))
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match="save it again"):
        Adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no adapter_config"):
        Adapter(tmp_path)
    with pytest.raises(AdapterRefusedError, match="expected"):
        Adapter(save_adapter(tmp_path / "conv", {"q": (torch.zeros(2, 3, 1, 1), torch.zeros(4, 2, 1, 1))}))
    A, B = factors((8, 6), 2, 0)
    A[0, 0] = torch.nan
    broken = Adapter(save_adapter(tmp_path / "nan", {"q": (A, B)}))
    with pytest.raises(NonFiniteError, match="nan: q"):
        broken.load("q")
    (tmp_path / "nan" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputChangedError):
        broken.check_unchanged()
