"""Texts in the headers of weight files: those of the base are kept."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints

MODELSPEC = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "Straße"}


def weights(seed, names=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 6, generator=generator) for name in names}


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_single_file_keeps_its_texts_but_not_its_hashes(tmp_path):
    given = MODELSPEC | {"modelspec.hash_sha256": "0x123", "sshs_model_hash": "456", "format": "mlx"}
    save_file(weights(0), tmp_path / "base.safetensors", given)
    save_file(weights(1), tmp_path / "tuned.safetensors", {"modelspec.title": "another"})
    paths = {"base_model": tmp_path / "base.safetensors", "models": [tmp_path / "tuned.safetensors"]}
    merge_checkpoints(MergeConfig("task_arithmetic", **paths), tmp_path / "out.safetensors")
    assert metadata(tmp_path / "out.safetensors") == MODELSPEC | {"format": "pt"}


def test_shards_keep_what_their_files_have_in_common(tmp_path):
    for folder, seed in (("base", 0), ("tuned", 1)):
        (tmp_path / folder).mkdir()
        for index, name in enumerate("ab"):
            own = {"title": "one", "part": str(index), "format": "pt"}
            file = tmp_path / folder / f"model-0000{index + 1}-of-00002.safetensors"
            save_file(weights(seed, (name,)), file, own)
        (tmp_path / folder / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", '
            '"b": "model-00002-of-00002.safetensors"}}'
        )
    config = MergeConfig("tsvm", base_model=tmp_path / "base", models=[tmp_path / "tuned"])
    merge_checkpoints(config, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert metadata(file) == {"title": "one", "format": "pt"}
