"""Tiny models of real families, made from a configuration alone, with a batch to run each on."""

from dataclasses import dataclass, field

import pytest
import torch

diffusers, peft, transformers = (
    pytest.importorskip(package, reason=f"{package} is not installed: run make test-models")
    for package in ("diffusers", "peft", "transformers")
)

VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """A configuration, the class to load it with, and what `save_pretrained` is told."""

    model: type
    config: type | None = None  # None: the options are the model's own
    options: dict = field(default_factory=dict)
    batch: str = "text"
    tied: dict[str, str] = field(default_factory=dict)  # in state dicts: copy to original
    packed: int = 0  # packed experts in the state dict
    saving: dict = field(default_factory=dict)

    def build(self, seed=0):
        torch.manual_seed(seed)
        if self.config is None:
            return self.model(**self.options).eval()
        return self.model(self.config(**self.options)).eval()


TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
DEEPSEEK = TEXT | {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
DEEPSEEK.pop("head_dim")

FAMILIES = {
    "llama": Family(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, TEXT, saving={"max_shard_size": "20KB"}
    ),
    "llama, tied": Family(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, TEXT | {"tie_word_embeddings": True}, tied=HEAD
    ),
    "qwen3-moe": Family(
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        TEXT | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
        packed=4,
    ),
    "mixtral": Family(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
        packed=4,
        saving={"max_shard_size": "40KB"},
    ),
    "gpt-oss": Family(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        packed=4,
    ),
    "llama-4": Family(
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 1},
        packed=4,
        saving={"max_shard_size": "40KB"},
    ),
    "deepseek-v3": Family(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, DEEPSEEK, packed=2),
    "gemma-3 with images": Family(
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config,
        {
            "text_config": TEXT | {"sliding_window": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        batch="image and text",
        tied={"lm_head.weight": "model.language_model.embed_tokens.weight"},
    ),
    "t5": Family(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        batch="pairs",
        tied=dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
        ),
    ),
    "bert": Family(
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")},
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "whisper": Family(
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        batch="speech",
        tied={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ),
    "mamba": Family(
        transformers.MambaForCausalLM,
        transformers.MambaConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        tied={"lm_head.weight": "backbone.embeddings.weight"},
    ),
    "unet": Family(
        diffusers.UNet2DConditionModel,
        options={
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8, "layers_per_block": 1,
        },
        batch="noisy image",
    ),
    "flux": Family(
        diffusers.FluxTransformer2DModel,
        options={
            "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        batch="patches",
        saving={"max_shard_size": "100KB"},
    ),
}  # fmt: skip


def batch_of(family, seed=0):
    """Return the arguments of a forward pass."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=draw)

    tokens = torch.randint(3, 80, (2, 8), generator=draw)
    match family.batch:
        case "text":
            return {"input_ids": tokens}
        case "pairs":
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
        case "image and text":
            tokens[:, 1:5] = 90
            return {
                "input_ids": tokens, "pixel_values": noise(2, 3, 16, 16),
                "token_type_ids": (tokens == 90).long(),
            }  # fmt: skip
        case "speech":
            return {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens}
        case "noisy image":
            return {
                "sample": noise(2, 4, 8, 8), "timestep": torch.tensor([1, 9]),
                "encoder_hidden_states": noise(2, 5, 16),
            }  # fmt: skip
        case "patches":
            return {
                "hidden_states": noise(2, 4, 16), "encoder_hidden_states": noise(2, 5, 16),
                "pooled_projections": noise(2, 16), "timestep": torch.tensor([0.1, 0.9]),
                "guidance": torch.ones(2), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3),
            }  # fmt: skip
    raise ValueError(family.batch)


def run(model, family, seed=0):
    """Return the model's answer to a batch: logits, or what it predicts of an image."""
    output = model(**batch_of(family, seed))
    return output.logits if hasattr(output, "logits") else output.sample


def fine_tune(model, family, seed):
    """Take one step of AdamW on a batch of its own, and a step of noise for whatever no gradient reaches."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    run(model, family, seed).square().mean().backward()
    optimiser.step()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and torch.equal(tensor, before[name]):
            tensor += 0.01 * torch.randn_like(tensor)
    return model


def load(family, path, **options):
    """Load a model; every tensor must come from its files, and every tensor in its files must be wanted."""
    model, loading = family.model.from_pretrained(path, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    return model.eval()


def assert_same(merged, expected, tolerance):
    """Every tensor of a model is the expected one."""
    torch.testing.assert_close(merged.state_dict(), expected, rtol=tolerance, atol=tolerance)


def assert_runs(merged, base, family):
    with torch.no_grad():
        answer = run(merged, family)
        assert answer.isfinite().all() and not torch.equal(answer, run(base, family))
    tensors = merged.state_dict()
    for copy, original in family.tied.items():
        assert tensors[copy].data_ptr() == tensors[original].data_ptr(), copy
