"""FP8 and MXFP4 checkpoints are merged exactly, beside models in other formats, and written in bfloat16."""

import json

import pytest
import torch
from checkpoints import digest, save
from safetensors.torch import load_file
from scaled_weights import draw, fp8, mxfp4, scaled_header

from r_tsvm_kernels import ConfigError, MergeConfig, extract_lora, merge_checkpoints, merge_state_dicts, verify_output
from r_tsvm_kernels.checkpoint import Checkpoint, requantise
from r_tsvm_kernels.cli import main
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


LAYOUTS = {
    "blocks": ((300, 200), (3, 2)), "rows": ((300, 200), (300,)), "matrix": ((300, 200), ()),
    "experts": ((3, 40, 24), (3, 1, 1)), "experts, one scale": ((3, 40, 24), (1,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def fp8_models(tmp_path_factory):
    """A base with FP8 weights, one of them never changed, and scales of activations; a fine-tune in float32."""
    folder = tmp_path_factory.mktemp("fp8")
    base, tuned, values = {"norm": torch.ones(3), "still.input_scale": torch.tensor(0.5)}, {"norm": torch.zeros(3)}, {}
    for index, (layout, shapes) in enumerate(LAYOUTS.items()):
        name = f"mlp.experts.w{index}" if "experts" in layout else f"w{index}.weight"
        base[name], base[f"{name}_scale"], values[name] = fp8(*shapes, seed=index)
        tuned[name] = values[name] + 0.1 * values[name].std() * draw(*shapes[0], seed=10 + index)
    base["still.weight"], base["still.weight_scale"], values["still.weight"] = fp8((300, 200), (3, 2), seed=20)
    tuned["still.weight"] = values["still.weight"].clone()
    config = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}
    return save(folder / "base", base, config=config), save(folder / "tuned", tuned), base, tuned, values


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm"])
def test_requantised(fp8_models, tmp_path, monkeypatch, method):
    base_path, tuned_path, base, tuned, values = fp8_models
    config = MergeConfig(method, base_model=base_path, models=[tuned_path], requantise=True, exclude=["w1.weight"])
    exact = merge_state_dicts({**values, "norm": base["norm"]}, [tuned], method).state_dict
    outputs = []
    for elements in (1 << 20, 1):
        monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (elements,))
        out = tmp_path / str(elements)
        result = merge_checkpoints(config, out, shard_size="100KB")
        outputs.append({name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()})
        assert verify_output(out, inputs=True).ok
        assert "quantization_config" in (out / "config.json").read_text()
    first, second = outputs
    assert first.keys() == second.keys() == base.keys()
    for name, tensor in base.items():
        assert (first[name].dtype, first[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(first[name].float(), second[name].float()), name
        if name in ("still.weight", "still.weight_scale", "still.input_scale", "w1.weight", "w1.weight_scale"):
            assert torch.equal(first[name].float(), tensor.float()), name
    read = Checkpoint(tmp_path / "1")
    for name in exact.keys() - {"norm", "w1.weight"}:
        change = (read.load(name) - exact[name]).double().norm()
        report = result.reports[name]
        torch.testing.assert_close(report.rounding_norm, float(change), rtol=1e-3, atol=1e-6)
        assert change <= 2**-4 * exact[name].norm()  # half a unit of E4M3 at most, on each element
    assert result.reports["w1.weight"].treatment == "base"
    rounding = json.loads(result.report_path.read_text())["summary"]["rounding"]
    assert 0.005 < rounding["relative"] <= rounding["largest"]["relative"] < 2**-4


def test_a_damaged_scale_is_found(fp8_models, tmp_path):
    base_path, tuned_path, *_ = fp8_models
    out = tmp_path / "out"
    merge_checkpoints(MergeConfig("linear", base_model=base_path, models=[tuned_path], requantise=True), out)
    header = Checkpoint(out, as_stored=True).tensors["w0.weight_scale"]
    content = bytearray(header.file.read_bytes())
    content[header.offset] ^= 1
    header.file.write_bytes(content)
    assert verify_output(out).changed == ["w0.weight_scale"]


def test_requantise_needs_fp8(models, fp8_models, tmp_path):
    paths, _ = models
    for base, message in ((paths[0], "is MXFP4"), (paths[1], "no weights in FP8")):
        with pytest.raises(ConfigError, match=f"requantise: .*{message}"):
            merge_checkpoints(
                MergeConfig("linear", base_model=base, models=[paths[2]], requantise=True), tmp_path / "o"
            )
    base_path, tuned_path, *_ = fp8_models
    arguments = ["merge", "--base", str(base_path), "--model", str(tuned_path), "--method", "linear", "--requantise"]
    assert main([*arguments, str(tmp_path / "cli")]) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_rounding_keeps_scales_that_fit(dtype):
    largest = torch.finfo(dtype).max
    scales = draw(2, 2).abs() + 0.1
    weight = (draw(130, 140, seed=1) * largest / 8).clamp(-largest, largest).to(dtype)
    values = weight.float() * scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :140]
    header = scaled_header(weight, scales)
    same = requantise(values, header, scales)
    assert (
        torch.equal(same.scales, scales)
        and torch.equal(same.weight.float(), weight.float())
        and same.rounding_norm == 0
    )
    grown = requantise(1000 * values, header, scales)
    assert (grown.scales > scales).all() and grown.weight.float().abs().max() == largest
    nothing = requantise(torch.zeros_like(values), header, scales)
    assert torch.equal(nothing.scales, scales) and not nothing.weight.float().any()


def test_a_stopped_merge_resumes_with_its_scales(fp8_models, tmp_path):
    base_path, tuned_path, *_ = fp8_models
    config = MergeConfig("linear", base_model=base_path, models=[tuned_path], requantise=True)

    def stop(progress):
        if progress.tensors_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", threads=1, progress=stop)
    resumed = merge_checkpoints(config, tmp_path / "out", resume=True)
    merge_checkpoints(config, tmp_path / "whole")
    assert resumed.resumed and verify_output(tmp_path / "out").ok
    assert digest(tmp_path / "out")["model.safetensors"] == digest(tmp_path / "whole")["model.safetensors"]


def test_state_dicts_are_not_requantised():
    with pytest.raises(ConfigError, match="requantise: state dicts are returned as values"):
        merge_state_dicts({"w": torch.zeros(4, 4)}, [{"w": torch.ones(4, 4)}], "ties", requantise=True)
