"""FP8 and MXFP4 checkpoints are merged exactly, beside models in other formats, and written in bfloat16."""

import json

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file
from scaled_weights import draw, fp8, mxfp4

from r_tsvm_kernels import MergeConfig, extract_lora, merge_checkpoints, merge_state_dicts, verify_output
from r_tsvm_kernels.engine import scheduling
from r_tsvm_kernels.engine.scheduling import smallest_schedule
from r_tsvm_kernels.plan import make_plan

Q, UP = "model.layers.0.q.weight", "model.layers.0.mlp.experts.up_proj"
CONFIG = {"model_type": "toy", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An FP8 and MXFP4 base, a fine-tune in bfloat16, one in FP8 by rows; folders and values."""
    folder = tmp_path_factory.mktemp("scaled")
    weight, scales, q = fp8((300, 200), (3, 2))
    blocks, powers, up = mxfp4(4, 12, 64)
    base = {Q: weight, f"{Q}_scale_inv": scales, f"{UP}_blocks": blocks, f"{UP}_scales": powers, "norm": torch.ones(3)}
    first = {Q: (q + draw(300, 200, seed=5)).bfloat16(), UP: (up + draw(4, 64, 12)).bfloat16(), "norm": torch.zeros(3)}
    row_weight, row_scales, q2 = fp8((300, 200), (300, 1), seed=7)
    second = {Q: row_weight, f"{Q}_scale": row_scales, UP: up.bfloat16(), "norm": torch.zeros(3)}
    paths = [
        save(folder / n, t, config=c) for n, t, c in (("base", base, CONFIG), ("a", first, None), ("b", second, None))
    ]
    values = [{Q: q, UP: up, "norm": torch.ones(3)}, first, {**second, Q: q2}]
    return paths, [{name: tensors[name] for name in (Q, UP, "norm")} for tensors in values]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsvm"])
def test_merges_are_those_of_the_dequantised_models(models, tmp_path, monkeypatch, method):
    paths, (base, *tuned) = models
    monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (5000,))
    config = MergeConfig(method, base_model=paths[0], models=paths[1:])
    merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = merge_state_dicts(base, tuned, method).state_dict
    assert set(merged) == set(expected) and merged["norm"].dtype == torch.float32
    for name in (Q, UP):
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], expected[name].bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "toy"}
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["dequantised"] == {str(paths[0]): 2, str(paths[2]): 1}
    assert verify_output(tmp_path / "out", inputs=True).ok


def test_excluded_weights_are_the_base_s_values(models, tmp_path):
    paths, (base, *_) = models
    config = MergeConfig("linear", base_model=paths[0], models=paths[1:], exclude=("*q.weight",), out_dtype="float32")
    merge_checkpoints(config, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[Q], base[Q])


def test_a_base_in_another_format(models, tmp_path):
    paths, (base, first, _) = models
    merge_checkpoints(MergeConfig("linear", base_model=paths[1], models=[paths[1], paths[0]]), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[Q], ((first[Q].float() + base[Q]) / 2).bfloat16())


def test_the_plan_counts_the_bytes_of_files_and_of_values(models):
    paths, _ = models
    plan = make_plan(MergeConfig("linear", base_model=paths[0], models=paths), 10**9)
    part, tensor = plan.tensors[Q].parts[0], plan.tensors[Q]
    assert part.file_bytes == 300 * 200 + 6 * 4 and part.nbytes(tensor.elements) == 4 * 300 * 200
    assert smallest_schedule(plan).tensors[Q].inputs >= 3 * 2 * 300 * 200
    assert plan.input_files()[0].passes == 1  # scales, which may be anywhere, do not count
    assert sum(file.bytes_read for file in plan.input_files()) == plan.bytes_read


def test_an_adapter_is_extracted_from_fp8(models, tmp_path):
    paths, (base, *_) = models
    result = extract_lora(paths[0], paths[2], tmp_path / "lora", rank=200, exclude=["norm", "*experts*"])
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (next(t for n, t in factors.items() if f"lora_{x}" in n).float() for x in "AB")
    change = models[1][2][Q] - base[Q]
    assert result is not None and (B @ A - change).norm() <= 0.01 * change.norm()
