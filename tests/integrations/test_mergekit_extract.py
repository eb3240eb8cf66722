"""mergekit's LoRA extraction on our truncated SVD: the decomposition, and the whole command."""

import json

import pytest
import torch
from safetensors.torch import load_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.integrations import mergekit as integration

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers


@pytest.fixture
def installed():
    integration.install()
    yield
    integration.uninstall()


def decompose(task_vector, **options):
    from mergekit.architecture import WeightInfo
    from mergekit.io.tasks import LoadTensor
    from mergekit.scripts.extract_lora import TaskVectorDecompositionTask

    source = LoadTensor(model="m", tensor="w.weight")
    task = TaskVectorDecompositionTask(
        weight_info=WeightInfo(name="w.weight"), input_task=source, **{"max_rank": 8, **options}
    )
    return task.execute(task_vector=task_vector)


def falling(m=60, n=40, dtype=torch.float32, rank=None):
    """A matrix whose singular values fall by a quarter from one to the next, of a given rank."""
    U, V = (torch.linalg.qr(torch.randn(size, min(m, n), dtype=torch.float64)).Q for size in (m, n))
    values = 0.75 ** torch.arange(min(m, n), dtype=torch.float64)
    values[rank or len(values) :] = 0
    return (U * values @ V.mT).to(dtype)


def best_error(matrix, rank):
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_rank": 3}, {"distribute_scale": False}, {"transpose": True}], ids=str)
def test_the_update_is_as_near_as_its_rank_allows(options, dtype, installed):
    matrix = falling(dtype=dtype)
    before = integration.calls().get("truncated_svd", 0)
    A, B = decompose(matrix, **options)
    assert integration.calls()["truncated_svd"] == before + 1
    integration.uninstall()
    theirs = decompose(matrix, **options)
    assert (A.shape, B.shape, A.dtype, B.dtype) == tuple(t.shape for t in theirs) + tuple(t.dtype for t in theirs)
    target = matrix.T.double() if options.get("transpose") else matrix.double()
    best = best_error(matrix, options.get("max_rank", 8))
    ours, other = (float((b.double() @ a.double() - target).norm()) for a, b in ((A, B), theirs))
    if dtype == torch.float32:
        assert ours <= best * (1 + 1e-6)
        torch.testing.assert_close(B @ A, theirs[1] @ theirs[0], rtol=0, atol=1e-5)
    else:  # the factors are rounded to the dtype on both sides
        assert ours <= 1.05 * other
    # The scale is where the option puts it.
    torch.testing.assert_close(A.double().norm(dim=1), theirs[0].double().norm(dim=1), rtol=1e-2, atol=1e-6)


def test_ranks_follow_sv_epsilon(installed):
    matrix = falling()
    values = torch.linalg.svdvals(matrix.double())
    for rank in (0, 1, 5, 8, 20):
        epsilon = float((values[rank - 1] + values[rank]) / 2) if rank else 2.0
        A, B = decompose(matrix, sv_epsilon=epsilon)
        assert A.shape == (min(rank, 8), 40) and B.shape == (60, min(rank, 8))


@pytest.mark.parametrize("rank", [0, 3])
def test_updates_of_a_smaller_rank_are_filled_up_with_zeros(rank, installed):
    matrix = falling(rank=rank) if rank else torch.zeros(60, 40)
    A, B = decompose(matrix)
    assert A.shape == (8, 40) and B.shape == (60, 8)
    assert not A[rank:].any() and not B[:, rank:].any()
    torch.testing.assert_close(B @ A, matrix, rtol=0, atol=1e-6)
    assert decompose(torch.zeros(5, 7))[0].shape == (5, 7)


def test_what_is_no_finite_matrix_is_left_to_mergekit(installed):
    before = integration.calls().get("truncated_svd", 0)
    for tensor in (torch.randn(2, 6, 4), torch.full((6, 4), torch.inf)):
        with pytest.raises(RuntimeError):  # mergekit's own
            decompose(tensor)
    matrix = torch.randn(6, 4, requires_grad=True)
    assert decompose(matrix)[0].requires_grad
    assert integration.calls().get("truncated_svd", 0) == before


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama and a fine-tune that changed its matrices by updates of rank 4."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                m, n = parameter.shape
                parameter += 0.02 * torch.randn(m, 4) @ torch.randn(4, n)
    model.save_pretrained(folder / "tuned")
    return folder


def extract(models, out, *options):
    arguments = ["--model", str(models / "tuned"), "--base-model", str(models / "base"), "--out-path", str(out)]
    assert main(["mergekit", "extract-lora", *options, *arguments, "--max-rank", "4", "--no-cuda", "--quiet"]) == 0
    return load_file(out / "adapter_model.safetensors")


def test_the_command_extracts_what_mergekit_extracts(models, tmp_path):
    before = integration.calls().get("truncated_svd", 0)
    ours = extract(models, tmp_path / "ours")
    assert integration.calls()["truncated_svd"] == before + 14  # seven matrices in each layer
    theirs = extract(models, tmp_path / "theirs", "--no-accelerate")
    assert integration.calls()["truncated_svd"] == before + 14
    base, tuned = (load_file(models / name / "model.safetensors") for name in ("base", "tuned"))
    assert ours.keys() == theirs.keys()
    adapted = 0
    for name, tensor in ours.items():
        if not name.endswith(".lora_A.weight"):
            assert name.endswith(".lora_B.weight") or torch.equal(tensor, theirs[name])
            continue
        module, other = name.removesuffix(".lora_A.weight"), name.replace("lora_A", "lora_B")
        weight = module.removeprefix("base_model.model.") + ".weight"
        update = ours[other] @ tensor
        torch.testing.assert_close(update, tuned[weight] - base[weight], rtol=0, atol=1e-5)
        torch.testing.assert_close(update, theirs[other] @ theirs[name], rtol=0, atol=1e-5)
        adapted += 1
    assert adapted == 14
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
