"""Packed experts and routers: names, and the merge of each expert as a matrix of its own."""

import pytest
import torch

from r_tsvm_kernels import ConfigError, MergeConfig, NonFiniteError, ShapeError, merge_state_dicts, merge_tensors
from r_tsvm_kernels.blocks import WHOLE, Blocks, blocks_of
from r_tsvm_kernels.experts import are_experts, is_router

PLACE = "model.layers.0.mlp.experts"
SHAPES = {f"{PLACE}.gate_up_proj": (4, 24, 16), f"{PLACE}.down_proj": (4, 16, 12), f"{PLACE}.down_proj_bias": (4, 16)}
ROUTER = "model.layers.0.mlp.gate.weight"


def models(tasks=3, shapes=SHAPES):
    """A base and fine-tunes with packed experts, of which the last is untouched, and a router."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, ROUTER: (4, 16)}.items()}
    tuned = [
        {n: t + 0.02 * torch.randn(t.shape, generator=generator) ** 3 for n, t in base.items()} for _ in range(tasks)
    ]
    for name in shapes:
        for model in tuned:
            model[name][-1] = base[name][-1]
    return base, tuned


def one_by_one(tensors):
    """The same model as most files hold it: experts apart, and the projections gate and up apart."""
    found = {ROUTER: tensors[ROUTER]}
    for expert in range(4):
        gate, up = tensors[f"{PLACE}.gate_up_proj"][expert].chunk(2)
        down, bias = tensors[f"{PLACE}.down_proj"][expert], tensors[f"{PLACE}.down_proj_bias"][expert]
        names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "down_proj.bias")
        found |= {f"{PLACE}.{expert}.{name}": t.clone() for name, t in zip(names, (gate, up, down, bias), strict=True)}
    return found


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{PLACE}.gate_up_proj", (4, 24, 16), True),
        ("language_model.model.layers.1.feed_forward.experts.down_proj", (4, 24, 16), True),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 24, 16), True),
        ("model.layers.0.moe.up_proj.weight", (4, 24, 16), True),
        (f"{PLACE}.gate_up_proj_bias", (4, 24), True),
        (f"{PLACE}.3.up_proj.weight", (24, 16), False),
        (f"{PLACE}.3.conv1d.weight", (24, 1, 4), False),
        (f"{PLACE}.conv.weight", (24, 16, 3), False),
        ("encoder.layers.0.conv1.weight", (24, 16, 3), False),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (24, 16), False),
        ("model.layers.0.mlp.experts.expert_1.wi.weight", (24, 16), False),
    ],
)
def test_names_tell_experts(name, shape, expected):
    assert are_experts(name, shape) is expected
    assert blocks_of(name, shape).packed is expected


def test_names_tell_routers():
    routers = [
        "mlp.router.weight",
        "mlp.router.bias",
        "mlp.gate.weight",
        "feed_forward.router.weight",
        "ffn.router.layer.weight",
    ]
    others = [
        "mlp.gate_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.shared_expert_gate.weight",
        "mlp.experts.0.gate.proj",
    ]
    assert all(map(is_router, routers)) and not any(map(is_router, others))


def test_stacked_projections_are_known_by_the_layer_after_them():
    fused, after = f"{PLACE}.gate_up_proj", f"{PLACE}.down_proj"
    assert blocks_of(fused, (4, 24, 16), {after: (4, 16, 12)}.get) == Blocks(packed=True, sizes=(12, 12))
    assert blocks_of(fused, (4, 16, 24), {after: (4, 12, 16)}.get) == Blocks(packed=True)  # columns, as in gpt-oss
    assert blocks_of(fused, (4, 24, 16)) == Blocks(packed=True)


@pytest.mark.parametrize(
    "method", ["tsvm", "rtsvm", "iso_c", "star", "ties", "breadcrumbs", "model_stock", "task_arithmetic"]
)
def test_packed_experts_are_merged_as_if_they_were_apart(method):
    base, tuned = models()
    own = {"rtsvm": {"density": 0.7}, "ties": {"density": 0.4}, "breadcrumbs": {"density": 0.4}}.get(method, {})
    packed = merge_state_dicts(base, tuned, method, **own)
    apart = merge_state_dicts(one_by_one(base), [one_by_one(model) for model in tuned], method, **own)
    found = one_by_one(packed.state_dict)
    assert found.keys() == apart.state_dict.keys()
    for name, tensor in apart.state_dict.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)
    for name in SHAPES:  # nobody touched the last expert
        assert torch.equal(packed.state_dict[name][-1], base[name][-1])
    report = packed.reports[f"{PLACE}.gate_up_proj"]
    if method in ("tsvm", "rtsvm"):
        first = apart.reports[f"{PLACE}.0.gate_proj.weight"]
        assert report.blocks[0].part == "[0, 0:12]" and len(report.blocks) == 8
        assert report.blocks[0].ranks == first.ranks and report.blocks[0].interference == first.interference
        assert report.certificate.error == max(block.certificate.error for block in report.blocks)
        assert packed.reports[f"{PLACE}.down_proj_bias"].treatment == "mean"


@pytest.mark.parametrize("method", ["tsvm", "rtsvm"])
def test_a_batch_of_experts_has_a_rank_for_each(method):
    base, tuned = models()
    name = f"{PLACE}.down_proj"
    batch = merge_tensors(base[name], [model[name] for model in tuned], method, name=name, solver="products")
    alone = merge_tensors(base[name], [model[name] for model in tuned], method, name=name)
    assert {block.certificate.route for block in batch.report.blocks[:3]} == {"products-fp16x3"}
    assert [block.ranks for block in batch.report.blocks] == [block.ranks for block in alone.report.blocks]
    update = alone.weight - base[name]
    assert (batch.weight - alone.weight).norm() <= 1e-4 * update.norm()


def test_random_masks_differ_between_experts():
    base, tuned = torch.zeros(2, 6, 8), [torch.ones(2, 6, 8)]
    merged = merge_tensors(base, tuned, "dare_linear", density=0.5, name="mlp.experts.down_proj").weight
    assert not torch.equal(merged[0], merged[1])
    part = merge_tensors(
        base[1:], [tuned[0][1:]], "dare_linear", density=0.5, name="mlp.experts.down_proj", blocks=Blocks(True, first=1)
    )
    assert torch.equal(part.weight[0], merged[1])


def test_errors_name_the_expert():
    name = f"{PLACE}.down_proj"
    base = torch.zeros(3, 4, 5)
    bad = base.clone()
    bad[2, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"down_proj\[2\]"):
        merge_tensors(base, [bad], "tsvm", name=name)
    with pytest.raises(ShapeError, match="down_proj"):
        merge_tensors(base, [torch.zeros(4, 4, 5)], "tsvm", name=name)


def test_other_tensors_of_three_dimensions_get_the_mean():
    base = torch.zeros(4, 5, 3)
    result = merge_tensors(base, [base + 1, base + 3], "tsvm", name="conv.weight")
    assert result.report.treatment == "mean" and result.report.blocks == []
    whole = merge_tensors(base, [base + 1, base + 3], "tsvm", name="experts.down_proj", blocks=WHOLE)
    assert whole.report.treatment == "mean"


@pytest.mark.parametrize("method", ["tsvm", "ties", "linear"])
def test_routers_are_treated_as_chosen(method):
    base, tuned = models(tasks=2)
    weight = [0.25, 0.75]
    kept = merge_state_dicts(base, tuned, method, router="base", weight=weight)
    assert torch.equal(kept.state_dict[ROUTER], base[ROUTER]) and kept.reports[ROUTER].reason == "router"
    mean = merge_state_dicts(base, tuned, method, router="mean", weight=weight).state_dict[ROUTER]
    changes = [model[ROUTER].double() - base[ROUTER].double() for model in tuned]
    scale = 1 if method == "linear" else 1 / 2  # the weighted average, or the mean of the weighted task vectors
    expected = base[ROUTER].double() + scale * (0.25 * changes[0] + 0.75 * changes[1])
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_choice_without_routers_is_refused():
    with pytest.raises(ConfigError, match="router: base has no effect"):
        merge_state_dicts({"w": torch.zeros(3)}, [{"w": torch.ones(3)}], "ties", router="base")
    with pytest.raises(ConfigError, match="router"):
        MergeConfig("ties", router="keep")
