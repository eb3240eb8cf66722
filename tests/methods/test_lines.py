"""LiNeS is a gradient of alpha: docs/methods.md."""

import pytest
import torch
from compare import relative_error

from r_tsvm_kernels import MergeConfig, merge_state_dicts


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_gradient_of_alpha_scales_the_layers_as_lines_does(layers):
    torch.manual_seed(0)
    names = ["embed.weight", *(f"layers.{index}.weight" for index in range(layers)), "head.weight"]
    base, *tuned = ({name: torch.randn(6, 5, dtype=torch.float64) for name in names} for _ in range(3))
    alpha, beta = 0.2, 0.5
    config = MergeConfig("task_arithmetic", parameters={"alpha": [alpha, alpha + beta]})
    merged = merge_state_dicts(base, tuned, config).state_dict
    for layer in range(1, layers + 1):  # Wang et al., section 4: layer 1 is the shallowest
        name = f"layers.{layer - 1}.weight"
        scale = alpha + beta * ((layer - 1) / (layers - 1) if layers > 1 else 1)
        exact = base[name] + scale * sum(model[name] - base[name] for model in tuned)
        assert relative_error(merged[name], exact) < 1e-12
    for name in ("embed.weight", "head.weight"):
        exact = base[name] + alpha * sum(model[name] - base[name] for model in tuned)
        assert relative_error(merged[name], exact) < 1e-12
