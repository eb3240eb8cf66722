"""Adapters that PEFT makes of real models are merged into them as PEFT itself merges each."""

import pytest
import torch
from families import FAMILIES, assert_runs, assert_same, load, peft

from r_tsvm_kernels import AdapterRefusedError, MergeConfig, merge_checkpoints, merge_state_dicts

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own

TARGETS = {
    "llama": {"target_modules": "all-linear"},
    "llama, tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "gemma-3 with images": {"target_modules": "all-linear"},
    "t5": {"target_modules": ["q", "v", "wo"]},
    "whisper": {"target_modules": ["q_proj", "fc1"]},
    "mamba": {"target_modules": ["in_proj", "x_proj"]},
    "flux": {"target_modules": ["to_q", "proj_out"]},
    "unet": {"target_modules": ["to_q", "to_v", "conv1"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"]},
    "gpt-oss": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}
REFUSED = {"unet": "factors of convolutions", "mixtral": "target_parameters", "gpt-oss": "target_parameters"}


def marks(name):
    """Adapters of some kinds are refused yet."""
    refused = pytest.mark.xfail(reason=f"refused: {REFUSED.get(name)}", raises=AdapterRefusedError, strict=True)
    return pytest.param(name, marks=refused if name in REFUSED else [])


@pytest.mark.parametrize("name", [marks(name) for name in TARGETS])
def test_adapters_are_merged_as_peft_merges_each(tmp_path, name):
    family, base = FAMILIES[name], tmp_path / "base"
    family.build().save_pretrained(base)
    adapters, tuned = [tmp_path / "first", tmp_path / "second"], []
    for seed, path in enumerate(adapters):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **TARGETS[name])
        model = peft.get_peft_model(load(family, base), config)
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
        assert_same(merged, expected, 1e-4)
