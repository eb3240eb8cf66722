"""The methods on task vectors of models that were really trained, in every storage dtype."""

import oracle
import pytest
import torch
from compare import relative_error
from safetensors.torch import load_file

from r_tsvm_kernels import MergeConfig, merge_state_dicts

pytestmark = pytest.mark.slow


def load(trained, dtype):
    folders = sorted(path.parent for path in trained.rglob("model.safetensors"))
    base = next(f for f in folders if f.name == "base")
    experts = [f for f in folders if f.parent.name == "experts" or f.name.startswith("expert")]
    assert len(experts) == 3
    return [{k: v.to(dtype) for k, v in load_file(f / "model.safetensors").items()} for f in (base, *experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["tsvm", "rtsvm"])
def test_merged_update_equals_float64(trained, method, dtype):
    base, *experts = load(trained, dtype)
    config = MergeConfig(merge_method=method, out_dtype="float64")
    merged = merge_state_dicts(base, experts, config)
    matrices = 0
    for name, weight in base.items():
        exact_base = weight.double().numpy()
        tuned = [expert[name].double().numpy() for expert in experts]
        exact = oracle.tsvm(exact_base, tuned) if method == "tsvm" else oracle.rtsvm(exact_base, tuned)[0]
        error = relative_error(merged.state_dict[name] - weight.double(), exact - exact_base)
        assert error < 1e-4, (name, error, merged.reports[name])
        matrices += weight.ndim == 2
    assert matrices >= 3
