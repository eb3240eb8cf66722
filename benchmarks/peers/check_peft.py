"""Check that PEFT and this package read the same numbers from the same adapters, written by either.

    benchmarks/peers/peft_env.sh
    .venv-peft/bin/python -m benchmarks.peers.check_peft

A tiny Llama and a tiny GPT-2 (whose weights are stored transposed) are the bases. Every line compares weights that
PEFT computes with float64: an error is the largest distance of a weight's update, relative to its Frobenius norm.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from r_tsvm_kernels.linalg import tsv_merge
from r_tsvm_kernels.lora import Adapter
from r_tsvm_kernels.lora_tools import extract_lora, merge_lora, resize_lora

ERROR_LIMIT = 1e-5
SEED = 0
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=96, n_positions=32,
                       bos_token_id=0, eos_token_id=0),
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "wte"],
}
# PEFT's settings, beside the targets.
KINDS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {r"layers\.1\..*q_proj": 2, "h.1.attn.c_attn": 2},
        "alpha_pattern": {"v_proj": 3, r"h\.\d.mlp.c_proj": 5},
    },
}  # fmt: skip

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    return {name: values.detach().double().clone() for name, values in model.state_dict().items()}


def load_with_peft(base: Path, adapter: Path) -> Weights:
    """The updates of all weights after PEFT has loaded the adapter and merged it in; a warning is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
        merged = weights_of(model.merge_and_unload())
    before = weights_of(AutoModelForCausalLM.from_pretrained(base))
    return {name: merged[name] - values for name, values in before.items()}


def train_with_peft(base: Path, out: Path, name: str, kind: str, seed: int) -> None:
    """An adapter with random factors, made and saved by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=TARGETS[name], task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **KINDS[kind]),
    )
    with torch.no_grad():
        for key, values in model.named_parameters():
            if "lora_" in key:
                values.copy_(0.1 * torch.randn_like(values))
    model.save_pretrained(out)


def ours(adapter: Path) -> Weights:
    """The updates as we read them, in float64."""
    opened = Adapter(adapter)
    return {
        module.weight_name: (matrix.left.double() * matrix.scale) @ matrix.right.double()
        for name, module in opened.modules.items()
        for matrix in [opened.task_matrix(name)]
    }


def best(update: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank]


def difference(got: Weights, expected: Weights) -> float:
    """The largest relative error; a weight that `expected` does not name must not have changed."""
    assert expected.keys() <= got.keys()
    errors = []
    for name, values in got.items():
        change = expected.get(name, torch.zeros(()))
        errors.append(float(torch.linalg.vector_norm(values - change) / (change.norm() or 1.0)))
    return max(errors)


def check_model(name: str, folder: Path) -> list[tuple[str, float]]:
    torch.manual_seed(SEED)
    base, tuned = folder / "base", folder / "tuned"
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.save_pretrained(base)
    before = weights_of(model)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.01 * torch.randn_like(values))
    model.save_pretrained(tuned)
    tied = name == "gpt2"  # wte and lm_head
    changes = {
        key: values - before[key]
        for key, values in weights_of(model).items()
        if values.ndim == 2 and not (tied and key in ("transformer.wte.weight", "lm_head.weight"))
    }
    linear = {key: change for key, change in changes.items() if "embed" not in key and "lm_head" not in key}
    linear = {key: change for key, change in linear.items() if "wpe" not in key}

    found = []
    extract_lora(str(base), str(tuned), folder / "e8", rank=8)
    expected = {key: best(change, 8) for key, change in linear.items()}
    found.append(("extract-lora --rank 8", difference(load_with_peft(base, folder / "e8"), expected)))
    result = extract_lora(str(base), str(tuned), folder / "energy", energy=0.6)
    expected = {key: best(change, result.modules[key.removesuffix(".weight")].rank) for key, change in linear.items()}
    found.append(("extract-lora --energy 0.6", difference(load_with_peft(base, folder / "energy"), expected)))
    extract_lora(str(base), str(tuned), folder / "all", rank=10**6, embed_lora=True)
    found.append(("extract-lora --embed-lora", difference(load_with_peft(base, folder / "all"), changes)))

    for seed, kind in enumerate(KINDS):
        train_with_peft(base, folder / kind, name, kind, seed)
        peft, read = load_with_peft(base, folder / kind), ours(folder / kind)
        if tied:
            peft.pop("lm_head.weight")
        found.append((f"what PEFT wrote, {kind}", difference(peft, read)))

    updates = [ours(folder / kind) for kind in KINDS]
    paths = [str(folder / kind) for kind in KINDS]
    outputs: dict[str, Weights] = {
        "resize-lora": {key: best(update, 2) for key, update in updates[0].items()},
        "merge-lora linear": {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]},
        "merge-lora tsvm": {
            key: tsv_merge([u[key] for u in updates], [min(4, *update.shape)] * len(updates)).matrix
            for key, update in updates[0].items()
        },
    }
    resize_lora(paths[0], folder / "resize-lora", rank=2)
    for method in ("linear", "tsvm"):
        merge_lora(paths, folder / f"merge-lora {method}", method=method)
    for title, expected in outputs.items():
        got = load_with_peft(base, folder / title)
        if tied:
            got.pop("lm_head.weight")
        found.append((title, difference(got, expected)))
    return found


def main() -> int:
    disable_progress_bar()
    worst = 0.0
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            for title, error in check_model(name, Path(folder)):
                print(f"{name:6} {title:28} {error:.1e} {'' if error <= ERROR_LIMIT else 'WRONG'}")
                worst = max(worst, error)
    return 0 if worst <= ERROR_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
