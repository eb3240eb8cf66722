"""LoRA files of image models, in the formats of kohya and diffusers."""

import json
import math

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import AdapterRefusedError, CheckpointError
from r_tsvm_kernels.lora.adapted_model import is_adapter
from r_tsvm_kernels.lora.image_adapter import ImageAdapter

TO_Q, CONV, POINT = "down_blocks.0.attentions.0.to_q", "down_blocks.0.resnets.0.conv1", "mid_block.proj_in"
TEXT_Q = "text_model.encoder.layers.0.self_attn.q_proj"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNET = {
    f"{TO_Q}.weight": draw(12, 8),
    f"{CONV}.weight": draw(6, 4, 3, 3, seed=1),
    f"{POINT}.weight": draw(10, 8, seed=2),
}
TEXT = {f"{TEXT_Q}.weight": draw(8, 8, seed=3)}
FACTORS = {
    TO_Q: (draw(2, 8, seed=4), draw(12, 2, seed=5)),
    CONV: (draw(2, 4, 3, 3, seed=6), draw(6, 2, 1, 1, seed=7)),
    POINT: (draw(2, 8, 1, 1, seed=8), draw(10, 2, 1, 1, seed=9)),  # of a convolution of one pixel, for a matrix
    TEXT_Q: (draw(2, 8, seed=10), draw(8, 2, seed=11)),
}


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    save(folder / "unet", UNET, stem="diffusion_pytorch_model")
    save(folder / "text_encoder", TEXT)
    index = {"_class_name": "P", "unet": ["diffusers", "UNet"], "text_encoder": ["transformers", "CLIP"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def kohya():
    """Factors with the alpha 1, and so the scale 1/2."""
    found = {}
    for module, (down, up) in FACTORS.items():
        flat = ("lora_te_" if module == TEXT_Q else "lora_unet_") + module.replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    return found, 0.5


def diffusers(down="lora_A", up="lora_B"):
    found = {}
    for module, (A, B) in FACTORS.items():
        named = ("text_encoder." if module == TEXT_Q else "unet.") + module
        found |= {f"{named}.{down}.weight": A, f"{named}.{up}.weight": B}
    return found, 1.0


def updated(start, module, scale):
    A, B = (factor.double() for factor in FACTORS[module])
    return start.double() + scale * (B.flatten(1) @ A.flatten(1)).view(start.shape)


FORMATS = {"kohya": kohya, "diffusers": diffusers, "diffusers, older": lambda: diffusers("lora.down", "lora.up")}


@pytest.mark.parametrize("form", FORMATS)
def test_a_pipeline_with_a_file(pipeline, tmp_path, form):
    tensors, scale = FORMATS[form]()
    save_file(tensors, tmp_path / "style.safetensors")
    config = MergeConfig("task_arithmetic", base_model=pipeline, models=[tmp_path / "style.safetensors"])
    merge_checkpoints(config, tmp_path / "out")
    unet = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    for merged, base in ((unet, UNET), (text, TEXT)):
        for name, tensor in merged.items():
            expected = updated(base[name], name.removesuffix(".weight"), scale)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)
    assert verify_output(tmp_path / "out", inputs=True).ok


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_component_or_a_single_file_as_base(tmp_path, prefix):
    save_file({prefix + name: t for name, t in UNET.items()}, tmp_path / "base.safetensors")
    tensors = {name: t for name, t in kohya()[0].items() if "_te_" not in name}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    out = tmp_path / "out.safetensors"
    inputs = ["--base", str(tmp_path / "base.safetensors"), "--model", str(tmp_path / "lora")]
    assert main(["merge", *inputs, "--method", "task_arithmetic", str(out)]) == 0
    found = load_file(out)[f"{prefix}{TO_Q}.weight"]
    torch.testing.assert_close(found.double(), updated(UNET[f"{TO_Q}.weight"], TO_Q, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["unet.", ""], ids=["of a pipeline", "of one component"])
def test_metadata_of_diffusers_has_the_scales(pipeline, tmp_path, prefix):
    tensors, settings = diffusers()[0], {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {CONV: 4}}
    if not prefix:
        tensors = {name.removeprefix("unet."): t for name, t in tensors.items() if name.startswith("unet.")}
        settings = {name.removeprefix("unet."): value for name, value in settings.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    base, unet = (pipeline, "unet") if prefix else (pipeline / "unet", "")
    merge_checkpoints(
        MergeConfig("task_arithmetic", base_model=base, models=[tmp_path / "a.safetensors"]), tmp_path / "out"
    )
    unet = load_file(tmp_path / "out" / unet / "diffusion_pytorch_model.safetensors")
    for module, scale in ((TO_Q, 3), (CONV, 2)):
        expected = updated(UNET[f"{module}.weight"], module, scale)
        torch.testing.assert_close(unet[f"{module}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"lora_unet_x.hada_w1_a": draw(2, 2)}, AdapterRefusedError, "LoHa"),
        ({**kohya()[0], "lora_unet_mid_block_proj_in.dora_scale": draw(10)}, AdapterRefusedError, "DoRA"),
        ({"lora_unet_x.lora_down.weight": draw(2, 2)}, CheckpointError, "lacks a factor"),
        ({"lora_unet_x.alpha": torch.tensor(1.0), **diffusers()[0]}, CheckpointError, "has alpha, but no factors"),
        ({"other.x.lora_A.weight": draw(2, 2), **diffusers()[0]}, AdapterRefusedError, "no known component"),
        ({"base_model.model.q.lora_A.weight": draw(2, 2)}, AdapterRefusedError, "give its folder"),
        (
            {"lora_unet_no.lora_down.weight": draw(2, 8), "lora_unet_no.lora_up.weight": draw(8, 2)},
            CheckpointError,
            "which .* does not have",
        ),
    ],
)
def test_what_is_refused(pipeline, tmp_path, tensors, error, message):
    save_file(tensors, tmp_path / "a.safetensors")
    assert is_adapter(tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        merge_checkpoints(
            MergeConfig("linear", base_model=pipeline, models=[tmp_path / "a.safetensors"]), tmp_path / "o"
        )


def test_models_are_no_adapters(tmp_path):
    save_file(UNET, tmp_path / "model.safetensors")
    assert not is_adapter(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": torch.ones(2)}, r"alpha of .* must be one finite number, got \(2,\)"),
        ({"alpha": torch.tensor(math.nan)}, "must be one finite number"),
        ({"lora_down.weight": torch.tensor(1.0)}, "must be matrices of rank 1 or more"),
        ({"lora_down.weight": torch.zeros(0, 8), "lora_up.weight": torch.zeros(12, 0)}, "of rank 1 or more"),
    ],
    ids=str,
)
def test_damaged_factors_are_refused_by_name(tmp_path, changes, said):
    tensors, _ = kohya()
    flat = "lora_unet_" + TO_Q.replace(".", "_")
    file = tmp_path / "lora.safetensors"
    save_file(tensors | {f"{flat}.{name}": value for name, value in changes.items()}, file)
    with pytest.raises(AdapterRefusedError, match=f"lora.safetensors.*{said}"):
        ImageAdapter(file)


@pytest.mark.parametrize("text", ['"abc"', "[1]", "3"])
def test_metadata_that_is_no_object_is_refused(tmp_path, text):
    tensors, _ = diffusers()
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is not valid: expected an object"):
        ImageAdapter(file)
