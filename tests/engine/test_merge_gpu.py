"""Whole merges of checkpoints on a GPU: the weights that a CPU gives, and the same bytes in any budget."""

import pytest
import torch
from checkpoints import save
from compare import relative_error
from safetensors.torch import load_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints
from r_tsvm_kernels.bench.case import all_on
from r_tsvm_kernels.engine import smallest_schedule
from r_tsvm_kernels.plan import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="merges on a GPU: needs a CUDA device"),
]

DEVICE = "cuda"
SHAPES = {
    "model.embed_tokens.weight": (300, 256),
    **{f"model.layers.{layer}.attn.weight": (256, 256) for layer in range(4)},
    **{f"model.layers.{layer}.mlp.weight": (640, 256) for layer in range(4)},
    "model.norm.weight": (256,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tuned = [{name: t + 0.05 * torch.randn(t.shape) for name, t in base.items()} for _ in range(3)]
    return base, [save(folder / str(index), weights) for index, weights in enumerate([base, *tuned])]


@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize(
    ("method", "parameters", "allowed"),
    [
        ("task_arithmetic", {}, 1e-5),
        ("ties", {"density": 0.3}, 1e-5),
        ("dare_linear", {"density": 0.5}, 1e-5),
        ("della_linear", {"density": 0.5, "epsilon": 0.1}, 1e-5),
        ("tsvm", {"solver": "eigen"}, 1e-4),
        ("tsvm", {"solver": "products"}, 1e-4),
        ("rtsvm", {"solver": "products", "density": 0.3}, 1e-4),
    ],
    ids=str,
)
def test_as_on_a_cpu(models, tmp_path, method, parameters, allowed, backend):
    base, (start, *tuned) = models
    entries = tuple({"model": str(model)} for model in tuned)
    config = MergeConfig(merge_method=method, base_model=str(start), models=entries, parameters=parameters)
    merge_checkpoints(config, tmp_path / "cpu.safetensors", device="cpu")
    budget = smallest_schedule(make_plan(config, 2**40), on_gpu=DEVICE == "cuda").peak_device_bytes
    with all_on(backend, DEVICE):
        merge_checkpoints(config, tmp_path / "gpu.safetensors", device=DEVICE)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            budget += torch.cuda.memory_reserved()  # by other tests
        merge_checkpoints(config, tmp_path / "small.safetensors", device=DEVICE, device_memory=budget)
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
    expected, got = (load_file(tmp_path / f"{where}.safetensors") for where in ("cpu", "gpu"))
    for name, weight in base.items():
        assert relative_error(got[name] - weight, expected[name].double() - weight.double()) < allowed, name
