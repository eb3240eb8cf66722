"""Candidates of any method that differ only in alpha share the update of one merge."""

import pytest
import torch
from checkpoints import family
from safetensors.torch import load_file, save_file
from swept import models

from r_tsvm_kernels import MergeConfig, merge_checkpoints, sweep_checkpoints
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.sweep import merger, plan_sweep
from r_tsvm_kernels.sweep.updates import for_update, from_update, is_scaled

SCALED = sorted(name for name in METHODS if is_scaled(MergeConfig(name)))
OPTIONS = {"density": 0.5, "gamma": 0.1, "rescale": True}


def options_of(method: str) -> dict:
    fields = METHODS[method].parameters.model_fields
    return {name: value for name, value in OPTIONS.items() if name in fields}


def both(config: MergeConfig, folder, alpha):
    """Return the tensors of a merge from the models, and of the same from the update of a merge."""
    asked = config.model_copy(update={"parameters": {**config.parameters, "alpha": alpha}})
    merge_checkpoints(for_update(asked), folder / "update")
    merge_checkpoints(asked, folder / "anew")
    merge_checkpoints(from_update(asked, folder / "update"), folder / "shared")
    assert {path.name for path in (folder / "shared").iterdir()} == {path.name for path in (folder / "anew").iterdir()}
    anew, shared = (load_file(folder / name / "model.safetensors") for name in ("anew", "shared"))
    assert {name: (t.dtype, t.shape) for name, t in anew.items()} == {n: (t.dtype, t.shape) for n, t in shared.items()}
    return anew, shared


@pytest.mark.parametrize("method", SCALED)
def test_the_update_gives_the_merge(method, tmp_path):
    """To rounding of float32: of the base plus the update, which is stored, and of the result."""
    config = models(tmp_path / "in", method, **options_of(method))
    anew, shared = both(config, tmp_path, [{"filter": "attn", "value": [0.0, 2.0]}, {"value": -1.5}])
    base = load_file(tmp_path / "in" / "base" / "model.safetensors")
    moved = 0
    for name, tensor in anew.items():
        if tensor.is_floating_point() and tensor.numel():
            limit = 4 * torch.finfo(torch.float32).eps * (tensor.abs() + base[name].abs() + (tensor - base[name]).abs())
            # Spectral methods promise more than float32's rounding of each element, but relative to the whole update.
            limit += 2e-6 * (tensor - base[name]).abs().max()
            assert ((shared[name] - tensor).abs() <= limit).all(), name
            moved += not torch.equal(shared[name], base[name])
        else:
            assert torch.equal(shared[name], tensor), name
    assert moved


@pytest.mark.parametrize("given", [{}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}])
def test_dtypes(given, tmp_path):
    config = models(tmp_path / "in", "ties", **given)
    shares = given != {"dtype": "bfloat16"}  # which rounds the base
    assert plan_sweep(config, grids={"alpha": [0.5, 1]}).shares is shares
    if shares:
        anew, shared = both(config, tmp_path, 0.5)
        for name, tensor in anew.items():
            torch.testing.assert_close(shared[name], tensor, rtol=2e-3 if "out_dtype" in given else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"calibrate": "svc"},
        {"requantise": True},
        {"vocabulary": "union"},
        {"vocabulary": "base", "pad_to_multiple_of": 8},
        {"chat_template": "auto"},
    ],
)
def test_recipes_that_share_nothing(change):
    assert is_scaled(MergeConfig("ties", base_model="base", models=["math"]))
    assert not is_scaled(MergeConfig("ties", base_model="base", models=["math"], **change))


def test_models_in_float64_share_nothing(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_file({"w": torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}, path)
    config = MergeConfig("iso_c", base_model=str(paths[0]), models=list(map(str, paths[1:])))
    plan = plan_sweep(config, grids={"alpha": [0.5, 1]})
    assert not plan.shares and plan.merged_anew == 2


def test_an_excluded_tensor_that_float32_does_not_hold(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    large = torch.tensor([1e300], dtype=torch.float64)
    for seed, path in enumerate(paths):
        save_file({"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)), "large": large}, path)
    config = MergeConfig("ties", base_model=str(paths[0]), models=list(map(str, paths[1:])), exclude=["large"])
    merged = []
    sweep_checkpoints(
        config, tmp_path / "out", grids={"alpha": [0.5, 1]},
        evaluate=lambda path: merged.append(load_file(next(path.glob("*.safetensors")))) or 1.0,
    )  # fmt: skip
    assert len(merged) == 2 and all(torch.equal(tensors["large"], large) for tensors in merged)


@pytest.mark.parametrize("missing", ["base", "mean_of_present"])
def test_missing_excluded_and_tied_tensors(missing, tmp_path):
    """Tensors that a model lacks, or the base, and those that keep the base's value, are those of a merge anew."""
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    file = paths[1] / "model.safetensors"
    tensors = load_file(file)
    lacking = next(name for name in tensors if "attn" in name)
    del tensors[lacking]
    save_file({**tensors, "extra.weight": torch.ones(3, 2)}, file, {"format": "pt"})
    models = list(map(str, paths[1:]))
    config = MergeConfig(
        "ties", base_model=str(paths[0]), models=models, density=0.4, missing=missing, exclude=["*norm*"]
    )
    shares = missing == "base"  # alpha does not scale the mean of those that have a tensor
    assert plan_sweep(config, grids={"alpha": [0.5, 1]}).shares is shares
    if shares:
        anew, shared = both(config, tmp_path, 0.5)
        assert lacking in shared and "extra.weight" not in shared
        for name, tensor in anew.items():
            torch.testing.assert_close(shared[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("patterns", [{"exclude": ["mask", "zeros"]}, {"include": ["w"]}])
def test_excluded_tensors_keep_every_bit(patterns, tmp_path):
    """A mask of infinities, and zeros of either sign, are those of the base in each candidate."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        tensors = {
            "w": torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)),
            "mask": torch.full((3, 3), -torch.inf).triu(1),
            "zeros": torch.tensor([-0.0, 0.0]),
        }
        save_file(tensors, path)
    config = MergeConfig("ties", base_model=str(paths[0]), models=list(map(str, paths[1:])), **patterns)
    merged = []

    def evaluate(path):
        merged.append(load_file(path / paths[0].name))
        return 1.0

    found = sweep_checkpoints(config, tmp_path / "out", grids={"alpha": [0.5, 1]}, evaluate=evaluate)
    assert len(merged) == 2 and all(trial.from_parts for trial in found.ranked)
    base = load_file(paths[0])
    for tensors in merged:
        assert all(
            torch.equal(tensors[name].view(torch.int32), base[name].view(torch.int32)) for name in ("mask", "zeros")
        )


def test_a_sweep_merges_once_for_all_values_of_alpha(tmp_path, monkeypatch):
    config, merged = models(tmp_path / "in", "ties"), []

    def recorded(own, *arguments, **options):
        merged.append(own.merge_method)
        return merge_checkpoints(own, *arguments, **options)

    monkeypatch.setattr(merger, "merge_checkpoints", recorded)
    grids = {"alpha": [0.5, 1, 1.5], "density": [0.2, 0.6]}
    plan = plan_sweep(config, grids=grids)
    assert plan.free == ("alpha",) and plan.groups_with_parts == 2 and plan.merged_anew == 0
    found = sweep_checkpoints(config, tmp_path / "out", grids=grids, evaluate=lambda path: 1.0)
    assert merged == ["ties", *["task_arithmetic"] * 3] * 2
    assert all(trial.from_parts for trial in found.ranked) and not list(tmp_path.rglob("parts-*"))


def test_a_merge_that_fails_is_a_candidate_that_failed(tmp_path):
    """The update fits float32; what does not fit the dtype of the output is a failure of its candidate."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "math", "code")]
    for path, value in zip(paths, (0.0, 3e4, 2e4), strict=True):
        save_file({"w": torch.full((2, 2), value, dtype=torch.float16)}, path)
    config = MergeConfig("ties", base_model=str(paths[0]), models=list(map(str, paths[1:])), normalize=False)
    found = sweep_checkpoints(config, tmp_path / "out", grids={"alpha": [0.5, 1, 2]}, evaluate=lambda path: 1.0)
    assert [trial.values["alpha"] for trial in found.failed] == [2] and "float16" in found.failed[0].failure
    assert len(found.ranked) == 2
