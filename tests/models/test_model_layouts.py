"""Folders that differ from each other, or hold several models."""

import pytest
import torch
from families import FAMILIES, assert_runs, assert_same, diffusers, fine_tune, load

from r_tsvm_kernels import CheckpointError, MergeConfig, merge_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own


def two_layouts(family, folder):
    """Save a base as releases have it, and a fine-tune as transformers holds it in memory."""
    family.build().save_pretrained(folder / "base")
    tuned = fine_tune(family.build(), family, 1)
    tuned.save_pretrained(folder / "as_released")
    load(family, folder / "as_released").save_pretrained(folder / "tuned", save_original_format=False)
    return folder / "base", folder / "tuned"


def test_prefixes_of_two_generations(tmp_path):
    """language_model.model... in files that follow the first releases, model.language_model... in others."""
    family = FAMILIES["gemma-3 with images"]
    paths = two_layouts(family, tmp_path)
    for number, (base, tuned) in enumerate([paths, paths[::-1]]):
        out = tmp_path / str(number)
        merge_checkpoints(MergeConfig("task_arithmetic", base_model=base, models=[tuned]), out)
        merged = load(family, out)
        assert_runs(merged, load(family, base), family)
        assert_same(merged, load(family, tuned).state_dict(), 1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_packed_experts_do_not_match_experts_one_by_one(tmp_path, name):
    base, tuned = two_layouts(FAMILIES[name], tmp_path)
    with pytest.raises(CheckpointError, match=r"its experts are stored packed, those of the base one by one"):
        merge_checkpoints(MergeConfig("ties", base_model=base, models=[tuned]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pipeline(seed):
    """A transformer for images of ten classes and an autoencoder, with noise that the seed chooses."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4)
    torch.manual_seed(seed)
    for model in (transformer, vae):
        for tensor in model.state_dict().values():
            tensor += 0.01 * torch.randn_like(tensor)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())


def test_a_pipeline_draws_with_all_its_parts_merged(tmp_path):
    paths = [tmp_path / name for name in ("base", "first", "second")]
    pipelines = [pipeline(seed) for seed in range(3)]
    for path, model in zip(paths, pipelines, strict=True):
        model.save_pretrained(path, max_shard_size="20KB")
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:]), tmp_path / "out")
    merged = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    for part in ("transformer", "vae"):
        start, *tuned = (getattr(model, part).state_dict() for model in pipelines)
        expected = {name: tensor + sum(other[name] - tensor for other in tuned) for name, tensor in start.items()}
        assert_same(getattr(merged, part), expected, 1e-6)
    merged.set_progress_bar_config(disable=True)
    images = merged(class_labels=[1, 2], num_inference_steps=2, output_type="pt").images
    assert torch.as_tensor(images).isfinite().all() and len(images) == 2
