"""A sharded Llama-shaped checkpoint merges, reloads with transformers and generates."""

import pytest
import torch
from compare import relative_error
from merging import tasks_of

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_tensors
from r_tsvm_kernels.methods import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers warns about many things of its own

transformers = pytest.importorskip("transformers", reason="reloads with transformers: pip install r-tsvm-kernels[test]")


def llama(tied, seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = llama(request.param, 0)
    base.bfloat16().save_pretrained(folder / "base", max_shard_size="15KB")
    for task in range(3):
        tuned = llama(request.param, 0)
        torch.manual_seed(100 + task)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        tuned.bfloat16().save_pretrained(folder / f"task{task}", max_shard_size="60KB" if task else "1GB")
    return folder


# One method of each kind; the others take the same way through the engine.
SOME = ("linear", "della", "rtsvm", "core_space")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in SOME else [pytest.mark.exhaustive]) for name in sorted(METHODS)]
)
def test_merges_reloads_and_generates(models, tmp_path, method):
    tasks = tasks_of(method, 3)
    paths = [str(models / name) for name in ("base", "task0", "task1", "task2")][: 1 + tasks]
    assert len(list((models / "base").glob("*.safetensors"))) > 2
    config = MergeConfig(merge_method=method, base_model=paths[0], models=tuple({"model": p} for p in paths[1:]))
    merge_checkpoints(config, tmp_path / "out", shard_size="50KB")
    merged, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, torch_dtype="auto"
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert merged.dtype == torch.bfloat16
    out = merged.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 8)
    base = transformers.AutoModelForCausalLM.from_pretrained(paths[0]).state_dict()
    tuned = [transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths[1:]]
    name = "model.norm.weight"
    expected = merge_tensors(base[name], [sd[name] for sd in tuned], config, name=name).weight
    assert relative_error(merged.state_dict()[name], expected) < 4e-3  # one bf16 rounding
