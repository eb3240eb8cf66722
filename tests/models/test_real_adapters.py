"""Adapters that PEFT makes of real models are merged into them as PEFT itself merges each."""

import pytest
import torch
from families import FAMILIES, assert_runs, assert_same, load, peft

from r_tsvm_kernels import AdapterRefusedError, MergeConfig, merge_checkpoints, merge_state_dicts

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own

# Family and options of PEFT.
ADAPTERS = {
    "every layer": ("llama", {"target_modules": "all-linear"}),
    "ranks of their own": ("llama", {"target_modules": "all-linear", "rank_pattern": {"mlp.*": 2}, "use_rslora": True}),
    "a tied embedding": ("llama, tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "whole tensors": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "images and text": ("gemma-3 with images", {"target_modules": "all-linear"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "speech": ("whisper", {"target_modules": ["q_proj", "fc1"]}),
    "states": ("mamba", {"target_modules": ["in_proj", "x_proj"]}),
    "transformer of images": ("flux", {"target_modules": ["to_q", "proj_out"]}),
    "convolutions": ("unet", {"target_modules": ["to_q", "to_v", "conv1"]}),
    "experts that are packed in memory": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]},
    ),
    "packed experts": ("gpt-oss", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}


def marks(name):
    """Adapters of one kind are refused yet."""
    refused = "target_parameters" in ADAPTERS[name][1]
    reason = "refused: adapters of bare parameters (target_parameters)"
    xfail = pytest.mark.xfail(reason=reason, raises=AdapterRefusedError, strict=True)
    return pytest.param(name, marks=xfail if refused else [])


@pytest.mark.parametrize("name", [marks(name) for name in ADAPTERS])
def test_adapters_are_merged_as_peft_merges_each(tmp_path, name):
    family, options = FAMILIES[ADAPTERS[name][0]], ADAPTERS[name][1]
    base, adapters, tuned = tmp_path / "base", [tmp_path / "first", tmp_path / "second"], []
    family.build().save_pretrained(base)
    for seed, path in enumerate(adapters):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, **options)
        model = peft.get_peft_model(load(family, base), config)
        with torch.no_grad():
            for parameter in filter(lambda x: x.requires_grad, model.parameters()):
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(path)
        tuned.append(model.merge_and_unload().state_dict())
    start = load(family, base)
    for method in ("task_arithmetic", "tsvm"):
        merge_checkpoints(MergeConfig(method, base_model=base, models=adapters), tmp_path / method)
        merged = load(family, tmp_path / method)
        assert_runs(merged, start, family)
        if method == "tsvm":
            expected = merge_state_dicts(start, tuned, method).state_dict
        else:
            expected = {key: t + sum(other[key] - t for other in tuned) for key, t in start.state_dict().items()}
        assert_same(merged, expected, 1e-5)
