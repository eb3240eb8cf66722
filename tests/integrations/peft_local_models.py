"""PEFT's own test of weighted combinations on models made on the spot: its models come from the network.

`run_suite.sh` copies this file into PEFT's tests.
"""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from .testing_common import PeftCommonTester

MODELS = {
    "llama": LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0),
}  # fmt: skip
CONFIGS = {
    "plain": {},
    "scaled": {"lora_alpha": 32},
    "embeddings": {"embeddings": True},
}


class TestLocalModels(PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        return {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}

    @pytest.mark.parametrize("settings", CONFIGS)
    @pytest.mark.parametrize("name", MODELS)
    def test_weighted_combination_of_adapters(self, tmp_path, name, settings):
        AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(tmp_path)
        settings = dict(CONFIGS[settings])
        targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[name]
        if settings.pop("embeddings", False):
            targets.append({"llama": "embed_tokens", "gpt2": "wte"}[name])
        config = {"r": 8, "task_type": "CAUSAL_LM", "target_modules": targets, "fan_in_fan_out": name == "gpt2",
                  "init_lora_weights": False, **settings}  # fmt: skip
        self._test_weighted_combination_of_adapters(str(tmp_path), LoraConfig, config)
