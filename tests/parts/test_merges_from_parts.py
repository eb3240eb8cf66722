"""Merges from parts equal direct ones in float64 within their certificates, whatever the weights."""

import json

import pytest
import torch
from adapters import random_adapter
from checkpoints import family, save, state_dict, tuned_state_dict
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    ConvergenceError,
    MergeConfig,
    decompose_checkpoints,
    merge_checkpoints,
    merge_tensors,
    verify_output,
)
from r_tsvm_kernels.parts import from_parts, linear_parameters

METHODS = {
    "tsvm": ("tsvm", {}),
    "rtsvm": ("rtsvm", {}),
    "rtsvm boosted": ("rtsvm", {"outlier_weighting": "boost", "density": 0.5}),
    "rtsvm weighted": ("rtsvm", {"preset": "weighted"}),
    "rtsvm of power 0.5": ("rtsvm", {"orthogonalization_power": 0.5}),
    "star": ("star", {}),
    "core_space": ("core_space", {}),
    "core_space, task arithmetic": ("core_space", {"inner_method": "task_arithmetic"}),
}
SHAPES = {"square": (48, 48), "tall": (72, 40), "wide": (40, 90), "vector": (48,), "stack": (3, 20, 30)}
WEIGHTS = (1.0, -0.5, 2.0, 0.0, 0.7, -1.0, 1.3, 0.2)


def models(folder, tasks, spread=0.02, rank=None):
    """Write a base and fine-tunes, whose changes have falling singular values or are of a low rank."""
    generator = torch.Generator().manual_seed(tasks)

    def change(shape):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
            S = S[0] * (1.0 + torch.arange(len(S))) ** -0.7
            noise = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        return spread * noise

    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    paths = [save(folder / "base", base)]
    for t in range(tasks):
        paths.append(
            save(folder / f"task{t}", {name: (x.double() + change(x.shape)).float() for name, x in base.items()})
        )
    return paths, [load_file(path / "model.safetensors") for path in paths]


def truth(method, options, weights, alpha, tensors, name):
    """The direct merge in float64."""
    base, *tuned = (model[name].double() for model in tensors)
    return merge_tensors(base, tuned, method, name=name, weight=weights, alpha=alpha, **options).weight


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("case", METHODS)
def test_any_weights_are_within_the_certificate(tmp_path, case, tasks, dense):
    method, options = METHODS[case]
    paths, tensors = models(tmp_path, tasks)
    recipe = MergeConfig(method, base_model=paths[0], models=paths[1:], **options)
    decompose_checkpoints(recipe, tmp_path / "parts", dense_above=0 if dense else None)
    for alpha, weights in ((1.0, [1.0] * tasks), (0.6, list(WEIGHTS[:tasks]))):
        asked = MergeConfig(method, base_model=paths[0], models=paths[1:], alpha=alpha, weight=weights, **options)
        out = tmp_path / f"out{alpha}"
        result = merge_checkpoints(from_parts(asked, tmp_path / "parts"), out)
        merged = load_file(out / "model.safetensors")
        for name, base in tensors[0].items():
            expected = truth(method, options, weights, alpha, tensors, name)
            update = (expected - base.double()).norm()
            rounding = 2**-24 * expected.norm()  # of the output
            certificate = result.reports[name].certificate
            stated = 1e-6 if certificate is None else certificate.error
            assert (certificate is None) == (len(SHAPES[name]) == 1 or name == "stack")
            assert float((merged[name].double() - expected).norm()) <= stated * float(update) + float(rounding)
        assert verify_output(out, inputs=True).ok
    assert verify_output(tmp_path / "parts", inputs=True).ok


def test_factors_are_no_larger_than_matrices(tmp_path):
    paths, _ = models(tmp_path, 3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    stored = load_file(tmp_path / "parts" / "task0.safetensors")
    assert {name: tuple(x.shape) for name, x in stored.items()} == {
        "square:left": (48, 16), "square:right": (16, 48), "tall:left": (72, 13), "tall:right": (13, 40),
        "wide:left": (40, 13), "wide:right": (13, 90), "vector": (48,), "stack": (3, 20, 30),
    }  # fmt: skip
    two, _ = models(tmp_path / "two", 2)
    decompose_checkpoints(MergeConfig("tsvm", base_model=two[0], models=two[1:]), tmp_path / "parts2")
    assert "square" in load_file(tmp_path / "parts2" / "task0.safetensors")  # two halves are as large as the whole


def test_leading_directions_are_the_best_of_their_rank(tmp_path):
    paths, tensors = models(tmp_path, 3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    alone = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], weight=[0.0, 1.0, 0.0])
    cut = from_parts(alone, tmp_path / "parts").model_copy(update={"parts_rank": 4})
    result = merge_checkpoints(cut, tmp_path / "cut")
    merged = load_file(tmp_path / "cut" / "model.safetensors")
    for name in ("square", "tall", "wide"):
        whole = truth("tsvm", {}, [0.0, 1.0, 0.0], 1.0, tensors, name) - tensors[0][name].double()
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        found = merged[name].double() - tensors[0][name].double()
        assert float((found - best).norm()) <= 1e-5 * float(best.norm()) + 1e-6 * float(merged[name].norm())
        assert result.reports[name].certificate is None and result.reports[name].ranks == [4, 4, 4]


def test_gradients_filters_and_other_dtypes(tmp_path):
    paths, base, _ = family(tmp_path / "in", tasks=3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], exclude=["*norm*"])
    decompose_checkpoints(recipe, tmp_path / "parts")
    weights = [[0.2, 1.0], [{"filter": "mlp", "value": -1.0}, {"value": 0.5}], 0.3]
    entries = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths[1:], weights, strict=True)]
    own = {"merge_method": "tsvm", "base_model": str(paths[0]), "models": entries, "exclude": ["*norm*"]}
    asked = MergeConfig.from_dict(own | {"parameters": {"alpha": [0.5, 1.5]}, "out_dtype": "float64"})
    merge_checkpoints(asked, tmp_path / "direct")
    merge_checkpoints(from_parts(asked, tmp_path / "parts"), tmp_path / "out")
    direct, found = (load_file(tmp_path / out / "model.safetensors") for out in ("direct", "out"))
    assert direct.keys() == found.keys()
    for name, expected in direct.items():
        assert found[name].dtype == expected.dtype
        if expected.is_floating_point():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=3e-7)
        else:
            assert torch.equal(found[name], expected)
    assert torch.equal(found["model.norm.weight"].float(), base["model.norm.weight"])


def test_adapters_stay_factors(tmp_path):
    base = {"model.q_proj.weight": torch.randn(40, 30), "model.norm.weight": torch.ones(30)}
    paths = [save(tmp_path / "base", base)]
    paths += [random_adapter(tmp_path / f"lora{t}", t, shapes={"model.q_proj": (40, 30)}) for t in range(3)]
    for number, (method, options) in enumerate(METHODS.values()):
        recipe = MergeConfig(method, base_model=paths[0], models=paths[1:], **options)
        decompose_checkpoints(recipe, tmp_path / f"parts{number}")
        asked = MergeConfig(method, base_model=paths[0], models=paths[1:], weight=[1.0, -0.5, 0.3], **options)
        merge_checkpoints(asked, tmp_path / f"direct{number}")
        merge_checkpoints(from_parts(asked, tmp_path / f"parts{number}"), tmp_path / f"out{number}")
        direct, found = (load_file(tmp_path / f"{x}{number}" / "model.safetensors") for x in ("direct", "out"))
        torch.testing.assert_close(found["model.q_proj.weight"], direct["model.q_proj.weight"], rtol=1e-5, atol=1e-4)
        assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize("case", METHODS)
def test_unchanged_tensors_rows_and_models(tmp_path, case):
    method, options = METHODS[case]
    shapes = {"same": (20, 30), "rows": (40, 30), "one": (30, 30), "few": (2, 9)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    paths = [save(tmp_path / "base", base)]
    for t in range(3):
        tuned = {name: x.clone() for name, x in base.items()}
        tuned["rows"][5:35] += 0.01 * torch.randn(30, 30)
        tuned["one"] += 0.01 * torch.randn(30, 30) * (t == 1)
        tuned["few"] += 0.01 * torch.randn(2, 9)
        paths.append(save(tmp_path / f"t{t}", tuned))
    decompose_checkpoints(MergeConfig(method, base_model=paths[0], models=paths[1:], **options), tmp_path / "parts")
    asked = MergeConfig(method, base_model=paths[0], models=paths[1:], weight=[1.0, 0.5, -0.7], **options)
    merge_checkpoints(asked, tmp_path / "direct")
    merge_checkpoints(from_parts(asked, tmp_path / "parts"), tmp_path / "out")
    direct, found = (load_file(tmp_path / out / "model.safetensors") for out in ("direct", "out"))
    for name, x in direct.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6)
    assert torch.equal(found["same"], base["same"]) and torch.equal(found["rows"][:5], base["rows"][:5])


def test_packed_experts(tmp_path):
    names = {"mlp.experts.gate_up_proj": (4, 24, 16), "mlp.experts.down_proj": (4, 16, 12)}
    base = {name: torch.randn(shape) for name, shape in names.items()}
    tuned = [{name: x + 0.05 * torch.randn(x.shape) for name, x in base.items()} for _ in range(3)]
    paths = [save(tmp_path / f"m{i}", tensors) for i, tensors in enumerate([base, *tuned])]
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    asked = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], weight=[1.0, 2.0, -1.0])
    merge_checkpoints(asked, tmp_path / "direct")
    merge_checkpoints(from_parts(asked, tmp_path / "parts"), tmp_path / "out")
    direct, found = (load_file(tmp_path / out / "model.safetensors") for out in ("direct", "out"))
    for name in names:
        torch.testing.assert_close(found[name], direct[name], rtol=0, atol=2e-6)


def test_the_bytes_do_not_depend_on_threads_or_memory(tmp_path):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    for number, threads in enumerate((1, 2)):
        decompose_checkpoints(recipe, tmp_path / f"parts{number}", threads=threads)
        merge_checkpoints(from_parts(recipe, tmp_path / f"parts{number}"), tmp_path / f"out{number}", threads=threads)
    files = ["parts{}/expert0.safetensors", "parts{}/expert2.safetensors", "out{}/model.safetensors"]
    for file in files:
        assert (tmp_path / file.format(0)).read_bytes() == (tmp_path / file.format(1)).read_bytes()


def test_fast_mode_stores_bfloat16_and_says_what_that_adds(tmp_path):
    paths, tensors = models(tmp_path, 3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], mode="fast")
    decompose_checkpoints(recipe, tmp_path / "parts")
    result = merge_checkpoints(from_parts(recipe, tmp_path / "parts"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("square", "tall", "wide"):
        expected = truth("tsvm", {}, [1.0] * 3, 1.0, tensors, name)
        error = float((merged[name] - expected).norm() / (expected - tensors[0][name]).norm())
        assert 1e-4 < error <= result.reports[name].certificate.error <= 1e-2
    exact = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    with pytest.raises(ConvergenceError, match="mode: fast"):  # these parts are not accurate enough for `exact`
        merge_checkpoints(from_parts(exact, tmp_path / "parts"), tmp_path / "exact")


def test_weights_that_cancel_are_refused(tmp_path):
    base, one = state_dict(0), tuned_state_dict(state_dict(0), 1)
    generator = torch.Generator().manual_seed(1)
    near = {
        name: x + 1e-7 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
        for name, x in one.items()
    }
    paths = [save(tmp_path / name, x) for name, x in (("base", base), ("one", one), ("near", near))]
    recipe = MergeConfig("star", base_model=paths[0], models=paths[1:], eta=100)
    decompose_checkpoints(recipe, tmp_path / "parts")
    asked = MergeConfig("star", base_model=paths[0], models=paths[1:], eta=100, weight=[1.0, -1.0])
    with pytest.raises(ConvergenceError, match="cancel"):
        merge_checkpoints(from_parts(asked, tmp_path / "parts"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_is_an_adapter_of_the_base(tmp_path):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    parts = [tmp_path / "parts" / f"expert{t}.safetensors" for t in range(3)]
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=paths[0], models=parts), tmp_path / "sum")
    merge_checkpoints(from_parts(recipe, tmp_path / "parts"), tmp_path / "out")
    found, expected = (load_file(tmp_path / out / "model.safetensors") for out in ("sum", "out"))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5)
    assert verify_output(tmp_path / "sum", inputs=True).ok


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("ties", {}, "not linear"),
        ("core_space", {"inner_method": "ties"}, "inner method ties"),
        ("core_space", {"isotropize": True}, "isotropize"),
        ("tsvm", {"requantise": True}, "requantise"),
        ("tsvm", {"parts": "elsewhere"}, "decomposed already"),
    ],
)
def test_what_cannot_be_decomposed(tmp_path, method, options, words):
    paths, _, _ = family(tmp_path / "in")
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], **options)
    with pytest.raises(ConfigError, match=words):
        decompose_checkpoints(config, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    if "parts" not in options:
        assert not linear_parameters(config)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"merge_method": "rtsvm"}, "merge_method was tsvm, is rtsvm"),
        ({"exclude": ["*norm*"]}, "exclude"),
        ({"conv": "flatten"}, "conv"),
        ({"models": ["a", "b"]}, "models"),
        ({"parameters": {"exclude_keys": ["*mlp*"]}}, "parameters"),
    ],
)
def test_parts_of_another_recipe_are_refused(tmp_path, change, words):
    paths, _, _ = family(tmp_path / "in")
    recipe = {"merge_method": "tsvm", "base_model": str(paths[0]), "models": [str(path) for path in paths[1:]]}
    decompose_checkpoints(MergeConfig.from_dict(recipe), tmp_path / "parts")
    with pytest.raises(ConfigError, match=words):
        from_parts(MergeConfig.from_dict(recipe | change), tmp_path / "parts")


def test_another_base_is_refused(tmp_path):
    paths, base, _ = family(tmp_path / "in")
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    other = save(tmp_path / "other", base | {"model.norm.weight": base["model.norm.weight"] + 1e-6})
    from_other = from_parts(recipe, tmp_path / "parts").model_copy(update={"base_model": str(other)})
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not the tensor"):
        merge_checkpoints(from_other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small = save(tmp_path / "small", base | {"model.norm.weight": base["model.norm.weight"][:3]})
    with pytest.raises(CheckpointError, match=r"has shape"):
        merge_checkpoints(from_other.model_copy(update={"base_model": str(small)}), tmp_path / "out")


def damage_json(folder):
    content = json.loads((folder / "parts.json").read_text())
    content["tensors"]["model.norm.weight"]["products"] = "x"
    (folder / "parts.json").write_text(json.dumps(content))


def other_format(folder):
    content = json.loads((folder / "parts.json").read_text())
    (folder / "parts.json").write_text(json.dumps(content | {"format": 99}))


def other_task(folder):
    content = json.loads((folder / "parts.json").read_text())
    content["tasks"][0]["name"] = "../in/base/model"
    (folder / "parts.json").write_text(json.dumps(content))


def other_shape(folder):
    tensors = load_file(folder / "expert0.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, folder / "expert0.safetensors")


def poisoned(folder):
    tensors = load_file(folder / "expert0.safetensors")
    save_file(tensors | {"model.norm.weight": torch.full((16,), torch.nan)}, folder / "expert0.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        damage_json, other_format, other_task, other_shape, poisoned,
        lambda folder: (folder / "parts.json").write_text("{"),
        lambda folder: (folder / "parts.json").unlink(),
        lambda folder: (folder / "expert1.safetensors").unlink(),
        lambda folder: (folder / "expert1.safetensors").write_bytes(b"12345678"),
    ],
)  # fmt: skip
def test_damaged_parts(tmp_path, damage):
    paths, _, _ = family(tmp_path / "in")
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    asked = from_parts(recipe, tmp_path / "parts")
    damage(tmp_path / "parts")
    with pytest.raises((CheckpointError, ValueError), match=r"parts|expert|norm"):
        merge_checkpoints(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_part_is_found_by_verify(tmp_path):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    file = tmp_path / "parts" / "expert1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    found = verify_output(tmp_path / "parts")
    assert len(found.changed) == 1 and found.changed[0].startswith("expert1/")
