"""Run a recipe in mergekit, on its own arithmetic, and in our runner, and compare what they write."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.integrations import mergekit as integration

# Outputs in float32 differ by rounding.
ROUNDING = 2e-6
ALIGNED = ("model.embed_tokens.weight", "lm_head.weight")


def weights(folder):
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


def by_mergekit(recipe, out, seed=0):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    integration.uninstall()
    options = MergeOptions(
        cuda=False, copy_tokenizer=True, quiet=True, write_model_card=False, random_seed=seed,
        lora_merge_cache=str(out) + ".adapted",
    )  # fmt: skip
    run_merge(MergeConfiguration.model_validate(json.loads(json.dumps(recipe))), str(out), options)
    return weights(out)


def by_us(recipe, out):
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))  # JSON is YAML
    assert main(["merge", str(file), str(out), "--device=cpu", "--quiet"]) == 0
    made = "+" in str(recipe.get("base_model"))  # an adapted base is a step, which is gone
    assert main(["verify", str(out), *([] if made else ["--inputs"])]) == 0
    return weights(out)


def both(recipe, tmp_path):
    """Return the tensors of both outputs, which have the same names."""
    theirs, ours = by_mergekit(recipe, tmp_path / "theirs"), by_us(recipe, tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    return theirs, ours


def assert_close(ours, theirs, label, tolerance=ROUNDING):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, label
    assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm(), label


def assert_same_config(tmp_path, *but):
    """The configurations of both outputs have the same values, apart from some keys."""
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    ignored = {"transformers_version", "_name_or_path", *but}
    assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}


def llama(folder, vocabulary, *, tied=False, layers=4, seed=0, dtype=torch.float32):
    """Write a small random model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def fine_tune(base, folder, seed, shared=9):
    """Write a variant of a model, with an update that has something in common with those of other seeds."""
    shutil.copytree(base, folder)
    generators = [torch.Generator().manual_seed(number) for number in (seed, shared)]
    tuned = {
        name: (tensor + 0.05 * sum(torch.randn(tensor.shape, generator=g) for g in generators)).to(tensor.dtype)
        for name, tensor in weights(base).items()
    }
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
