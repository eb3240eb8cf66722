"""Fused projections are merged as the matrices in them, and convolutions as matrices, where a recipe says so."""

import json

import pytest
import torch
from adapters import factors, save_adapter
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import ConfigError, MergeConfig, merge_checkpoints, merge_models, merge_state_dicts, merge_tensors
from r_tsvm_kernels.blocks import blocks_of, is_convolution
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.fused import known_splits

QKV, BIAS = "model.layers.0.attn.qkv_proj.weight", "model.layers.0.attn.qkv_proj.bias"
SIZES = (12, 6, 6)
SPLIT = {"*qkv_proj*": SIZES}
PHI = {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
DBRX = {"model_type": "dbrx", "d_model": 16, "n_heads": 4, "attn_config": {"kv_n_heads": 2}}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def models(shapes, tasks=3):
    base = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return base, [{n: t + 0.1 * draw(*t.shape, seed=50 * k + i) ** 3 for i, (n, t) in enumerate(base.items())}
                  for k in range(1, tasks + 1)]  # fmt: skip


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "ties", "model_stock", "linear"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_split_tensor_is_merged_as_its_parts(method, axis):
    base, tuned = models({QKV: (24, 16), BIAS: (24,)})
    if axis:  # as GPT-2 has it: inputs x outputs
        base, *tuned = ({QKV: model[QKV].mT.contiguous(), BIAS: model[BIAS]} for model in (base, *tuned))
    own = {"density": 0.5} if method == "ties" else {}
    merged = merge_state_dicts(base, tuned, method, split=SPLIT, **own)
    for name, dim in ((QKV, axis), (BIAS, 0)):
        parts = [
            merge_tensors(b, t, method, **own).weight
            for b, *t in zip(*(model[name].split(SIZES, dim) for model in (base, *tuned)), strict=True)
        ]
        torch.testing.assert_close(merged.state_dict[name], torch.cat(parts, dim), rtol=0, atol=1e-6)
    if method == "tsvm":
        whole = ":, " * axis
        labels = [block.part for block in merged.reports[QKV].blocks]
        assert labels == [f"[{whole}0:12]", f"[{whole}12:18]", f"[{whole}18:24]"]
        assert [block.ranks for block in merged.reports[QKV].blocks] == [[4] * 3, [2] * 3, [2] * 3]


def test_columns_of_experts():
    name, shape = "mlp.experts.gate_up_proj", (3, 16, 20)
    blocks = blocks_of(name, shape, split={"*gate_up_proj": (10, 10)})
    assert blocks.packed and blocks.axis == 1 and blocks.shapes(shape) == [(16, 10)] * 2
    assert [label for label, _ in blocks.of(torch.zeros(shape))][:2] == ["[0, :, 0:10]", "[0, :, 10:20]"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"*qkv*": [12, 6]}, r"qkv_proj.weight is 24 x 16, and the sizes \[12, 6\] sum to 18"),
        ({"qkv": [12, 12]}, r"split: 'qkv' matches no tensor"),
        ({"*qkv*": [24]}, "split"),
        ({"*qkv*": [0, 24]}, "split"),
        ("always", "split"),
        ("auto", "auto knows no fused tensor"),
    ],
)
def test_mistakes(split, message):
    base, tuned = models({QKV: (24, 16)})
    with pytest.raises(ConfigError, match=message):
        merge_state_dicts(base, tuned, "tsvm", split=split)


@pytest.mark.parametrize(
    ("config", "name", "shape", "sizes"),
    [
        (PHI, QKV, (32, 16), (16, 8, 8)),
        ({"model_type": "phi3", "intermediate_size": 20}, "mlp.gate_up_proj.weight", (40, 16), (20, 20)),
        ({"model_type": "gpt2", "n_embd": 16}, "h.0.attn.c_attn.bias", (48,), (16, 16, 16)),
        ({"text_config": {"model_type": "glm4", "intermediate_size": 20}}, "gate_up_proj.weight", (40, 16), (20, 20)),
        (DBRX, "attn.Wqkv.weight", (32, 16), (16, 8, 8)),
        ({}, "blocks.0.attn.qkv.weight", (48, 16), (16, 16, 16)),
        (PHI | {"model_type": "gpt_neox"}, "attention.query_key_value.weight", (48, 16), None),
        ({"model_type": "phi3"}, QKV, (32, 16), None),
    ],
)  # fmt: skip
def test_known_models(config, name, shape, sizes):
    assert known_splits(config, {name: shape, "norm.weight": (16,)}) == ({} if sizes is None else {name: sizes})


def test_on_disk_with_the_command_and_an_adapter(tmp_path, capsys):
    base, (tuned, _, _) = models({QKV: (24, 16), BIAS: (24,)})
    config = {"model_type": "phi3", "hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    paths = [save(tmp_path / name, tensors, config=config) for name, tensors in (("base", base), ("tuned", tuned))]
    adapter = save_adapter(tmp_path / "adapter", {QKV.removesuffix(".weight"): factors((24, 16), 3, 0)})
    arguments = ["--base", str(paths[0]), "--model", str(paths[1]), "--method", "iso_c"]
    assert main(["merge", *arguments, "--split", "*qkv_proj*=12,6,6", str(tmp_path / "given")]) == 0
    assert main(["merge", *arguments, "--split", "auto", str(tmp_path / "auto")]) == 0
    given, auto = (load_file(tmp_path / out / "model.safetensors") for out in ("given", "auto"))
    assert torch.equal(given[QKV], auto[QKV])
    assert torch.equal(given[QKV], merge_state_dicts(base, [tuned], "iso_c", split=SPLIT).state_dict[QKV])
    assert main(["inspect", *arguments, "--split", "auto", "--estimate-time"]) == 0
    assert "3 matrices of at most 12x16" in capsys.readouterr().out
    assert main(["merge", *arguments, "--split", "12,6", str(tmp_path / "bad")]) == 2
    updates = MergeConfig("iso_c", base_model=paths[0], models=[adapter], split=SPLIT)
    merge_checkpoints(updates, tmp_path / "lora")
    report = json.loads((tmp_path / "lora" / "merge_report.json").read_text())["tensors"][QKV]
    assert len(report["blocks"]) == 3
    merged = load_file(tmp_path / "lora" / "model.safetensors")[QKV]
    A, B = factors((24, 16), 3, 0)
    update = 2 * B @ A  # the alpha that `save_adapter` writes
    for part, expected, start in zip(merged.split(SIZES), update.split(SIZES), base[QKV].split(SIZES), strict=True):
        found = merge_tensors(start, [start + expected], "iso_c").weight
        torch.testing.assert_close(part, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("c.weight", (8, 4, 3, 3), True),
        ("c.weight", (8, 4, 3), True),
        ("", (8, 4, 3), True),
        ("c.weight", (8, 1, 3), False),
        ("pos_embed", (1, 8, 4), False),
        ("c.weight", (8, 4), False),
        ("mlp.experts.w1", (8, 4, 3), False),
    ],
)
def test_convolutions(name, shape, expected):
    assert is_convolution(name, shape) is expected


@pytest.mark.parametrize("method", ["tsvm", "rtsvm", "iso_c", "knots"])
def test_a_convolution_is_merged_as_a_matrix(method):
    base, tuned = models({"conv.weight": (12, 5, 3, 3), "depthwise.weight": (12, 1, 3, 3)})
    merged = merge_state_dicts(base, tuned, method, conv="flatten")
    flat = merge_tensors(base["conv.weight"].flatten(1), [t["conv.weight"].flatten(1) for t in tuned], method)
    assert torch.equal(merged.state_dict["conv.weight"], flat.weight.view(12, 5, 3, 3))
    report = merged.reports["conv.weight"]
    assert report.shape == (12, 5, 3, 3) and report.ranks == flat.report.ranks and report.treatment == "merge"
    mean = merge_state_dicts(base, tuned, method)
    for name in ("conv.weight", "depthwise.weight"):
        assert mean.reports[name].treatment == "mean"
    assert torch.equal(mean.state_dict["depthwise.weight"], merged.state_dict["depthwise.weight"])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_convolution_may_be_fused(axis):
    """As the attention of a UNet has it: q, k and v in one convolution. The sizes count output or input channels."""
    base, tuned = models({"qkv.weight": (9, 10, 2)})
    sizes = (3, 6) if axis == 0 else (4, 6)
    merged = merge_state_dicts(base, tuned, "tsvm", conv="flatten", split={"qkv*": sizes})
    for start, size in ((0, sizes[0]), (sizes[0], sizes[1])):
        own, *others = [x["qkv.weight"].narrow(axis, start, size).flatten(1) for x in (base, *tuned)]
        found = merged.state_dict["qkv.weight"].narrow(axis, start, size).flatten(1)
        assert torch.equal(found, merge_tensors(own, others, "tsvm").weight)
    assert len(merged.reports["qkv.weight"].blocks) == 2


def test_convolutions_on_disk_and_in_modules(tmp_path):
    modules = [torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last) for _ in range(3)]
    merged = merge_models(modules[0], modules[1:], "tsvm", conv="flatten").state_dict()
    paths = [
        save(tmp_path / str(i), {k: v.contiguous() for k, v in m.state_dict().items()}) for i, m in enumerate(modules)
    ]
    arguments = ["--base", str(paths[0]), "--model", str(paths[1]), "--model", str(paths[2]), "--method", "tsvm"]
    assert main(["merge", *arguments, "--conv", "flatten", str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], merged["weight"])
    page = (tmp_path / "out" / "merge_report.html").read_text()
    assert '"weight"' in page and "conv: flatten" in (tmp_path / "out" / "merge_recipe.yaml").read_text()


def test_a_part_with_fewer_rows_than_tasks():
    base, tuned = models({"w": (24, 16)})
    merged = merge_state_dicts(base, [*tuned, base], "rtsvm", split={"w": (22, 2)})
    mean = merge_tensors(base["w"][22:], [t["w"][22:] for t in [*tuned, base]], "rtsvm")
    assert mean.report.treatment == "mean"
    assert torch.equal(merged.state_dict["w"][22:], mean.weight)
    assert [report.treatment for report in merged.reports["w"].blocks] == ["merge", "mean"]
