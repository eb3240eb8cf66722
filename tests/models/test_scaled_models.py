"""DeepSeek-V3 in FP8 and gpt-oss in MXFP4, as they are released: what transformers reads in them is merged."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import save
from families import FAMILIES, assert_runs, assert_same, fine_tune, load, run, transformers
from safetensors.torch import load_file
from scaled_weights import mxfp4

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_state_dicts

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own

# Sides are two blocks of 128, or less than one: of a block and a part of one, transformers takes the halves for blocks.
# Columns in MXFP4 are blocks of 32.
DEEPSEEK = replace(FAMILIES["deepseek-v3"], options=FAMILIES["deepseek-v3"].options | {"hidden_size": 256})
GPT_OSS = replace(FAMILIES["gpt-oss"], options=FAMILIES["gpt-oss"].options | {"intermediate_size": 32})
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def in_fp8(tensors):
    """Divide each block of each projection by its scale, and round."""
    stored = {}
    for name, weight in tensors.items():
        if "proj" not in name:
            stored[name] = weight
            continue
        blocks = [columns for rows in weight.split(128) for columns in rows.split(128, dim=1)]
        scales = torch.stack([block.abs().max() / 448 for block in blocks]).view(-(-weight.shape[0] // 128), -1)
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        stored[name] = (weight / whole).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
    return stored


def in_mxfp4(tensors):
    """Put random experts in the place of those that are there."""
    stored = {}
    for seed, (name, weight) in enumerate(tensors.items()):
        if name.endswith("_proj"):
            experts, inputs, outputs = weight.shape
            stored[f"{name}_blocks"], stored[f"{name}_scales"], _ = mxfp4(experts, outputs, inputs, seed)
        else:
            stored[name] = weight
    return stored


def stored_in(layout, folder, out, quantization):
    """Write a model again with other tensors, in two files: scales may be in another file than their weights."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    return save(out, layout(load_file(folder / "model.safetensors")), shards=2, config=config)


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def models(request, tmp_path_factory):
    """A quantised base, a fine-tune of what it stands for, in float32, and one that is quantised again (FP8 only)."""
    folder = tmp_path_factory.mktemp("scaled")
    fp8 = request.param == "fp8"
    family, layout, reader = DEEPSEEK, in_fp8, transformers.FineGrainedFP8Config
    if not fp8:
        family, layout, reader = GPT_OSS, in_mxfp4, transformers.Mxfp4Config
    quantization = FP8 if fp8 else {"quant_method": "mxfp4"}

    def read(path):
        quantised = "quantization_config" in json.loads((path / "config.json").read_text())
        options = {"quantization_config": reader(dequantize=True)} if quantised else {}
        return load(family, path, dtype=torch.float32, **options)

    family.build().bfloat16().save_pretrained(folder / "plain")
    paths = [stored_in(layout, folder / "plain", folder / "base", quantization)]
    for seed in (1, 2):
        tuned = fine_tune(read(paths[0]), family, seed)
        tuned.save_pretrained(folder / f"tuned{seed}")
        paths.append(folder / f"tuned{seed}")
    if fp8:
        paths[1] = stored_in(layout, paths[1], folder / "again", quantization)
    return family, paths, read


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm"])
def test_the_values_that_transformers_reads_are_merged(models, tmp_path, method):
    family, paths, read = models
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], out_dtype="float32")
    merge_checkpoints(config, tmp_path / "out", shard_size="100KB")
    merged, (base, *tuned) = read(tmp_path / "out"), map(read, paths)
    assert_runs(merged, base, family)
    if method == "tsvm":
        expected = merge_state_dicts(base, tuned, method).state_dict
    else:
        start, *others = (model.state_dict() for model in (base, *tuned))
        expected = {name: t + sum(other[name] - t for other in others) for name, t in start.items()}
    assert_same(merged, expected, 1e-5)


def test_the_output_is_in_bfloat16(models, tmp_path):
    family, paths, _ = models
    merge_checkpoints(MergeConfig("ties", base_model=paths[0], models=paths[1:]), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    merged = load(family, tmp_path / "out", dtype="auto")
    assert merged.state_dict()["model.layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
    with torch.no_grad():
        assert run(merged, family).isfinite().all()


@pytest.mark.parametrize("models", ["fp8"], indirect=True)
def test_fp8_again(models, tmp_path):
    family, paths, read = models
    config = MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:])
    merge_checkpoints(config, tmp_path / "plain")
    merge_checkpoints(config.model_copy(update={"requantise": True}), tmp_path / "out", shard_size="50KB")
    plain, merged = load(family, tmp_path / "plain", dtype=torch.float32), read(tmp_path / "out")
    assert_runs(merged, read(paths[0]), family)
    for name, tensor in plain.state_dict().items():
        assert (merged.state_dict()[name] - tensor).norm() <= 2**-4 * tensor.norm(), name
