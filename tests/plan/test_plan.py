import json

import pytest
import torch
from checkpoints import family, save, state_dict, tuned_state_dict
from memory import measured

from r_tsvm_kernels import CheckpointError, ConfigError, MergeConfig, ShapeError
from r_tsvm_kernels.plan import make_plan


def config_for(paths, method="tsvm", **fields):
    base, *tuned = paths
    models = tuple({"model": str(path)} for path in tuned)
    return MergeConfig(merge_method=method, base_model=None if base is None else str(base), models=models, **fields)


def test_what_happens_to_each_tensor(tmp_path):
    paths, base, _ = family(tmp_path)
    plan = make_plan(config_for(paths, exclude=("*.1.mlp*",)), 10**9)
    kinds = {name: (t.treatment.kind, t.treatment.reason) for name, t in plan.tensors.items()}
    assert kinds == {
        "model.embed_tokens.weight": ("merge", ""),
        "model.layers.0.attn.weight": ("merge", ""),
        "model.layers.0.mlp.weight": ("merge", ""),
        "model.layers.1.attn.weight": ("merge", ""),
        "model.layers.1.mlp.weight": ("base", "excluded by pattern"),
        "model.norm.weight": ("mean", "not a matrix"),
        "scale": ("mean", "not a matrix"),
        "position_ids": ("base", "int64 buffer"),
        "mask": ("base", "bool buffer"),
        "nothing": ("base", "empty"),
    }
    assert plan.bytes_written == sum(t.numel() * t.element_size() for t in base.values())
    touched = plan.bytes_written - sum(
        base[n].numel() * base[n].element_size() for n, (k, _) in kinds.items() if k == "base"
    )
    assert plan.bytes_read == plan.bytes_written + 2 * touched


def test_shards_and_dtype_of_the_output(tmp_path):
    paths, base, _ = family(tmp_path)
    plan = make_plan(config_for(paths, out_dtype="bfloat16"), 3000)
    assert len(plan.shards) > 1
    assert sorted(name for shard in plan.shards.values() for name in shard) == sorted(base)
    for name, tensor in plan.tensors.items():
        assert tensor.spec.dtype == (torch.bfloat16 if base[name].is_floating_point() else base[name].dtype)


def test_slices_hold_as_many_layers_as_the_models(tmp_path):
    paths, *_ = family(tmp_path)
    assert len(make_plan(config_for(paths, num_layers=2), 10**9).tensors) == 10
    with pytest.raises(ConfigError, match=r"slices: layers \[0, 3\] of .*, which has 2"):
        make_plan(config_for(paths, num_layers=3), 10**9)


def test_a_listed_base_is_no_task_but_a_model_of_an_average(tmp_path):
    paths, _, _ = family(tmp_path)
    listed = [paths[0], paths[0], *paths[1:]]
    assert len(make_plan(config_for(listed, "task_arithmetic"), 10**9).tuned) == 2
    assert len(make_plan(config_for([paths[0], tmp_path / "expert0" / ".." / "base", *paths[1:]]), 10**9).tuned) == 2
    assert len(make_plan(config_for(listed, "linear"), 10**9).tuned) == 3


def test_an_average_needs_no_base(tmp_path):
    paths, _, _ = family(tmp_path)
    assert make_plan(config_for([None, *paths], "linear"), 10**9).base.path == paths[0]
    with pytest.raises(ConfigError, match="tsvm needs base_model"):
        make_plan(config_for([None, *paths]), 10**9)


def test_no_models(tmp_path):
    paths, _, _ = family(tmp_path)
    with pytest.raises(ConfigError, match="no fine-tuned models"):
        make_plan(config_for([paths[0], paths[0]]), 10**9)
    with pytest.raises(ConfigError, match="needs a `model`"):
        make_plan(MergeConfig(base_model=str(paths[0]), models=({},)), 10**9)


def changed(tmp_path, change):
    paths, _, tuned = family(tmp_path)
    change(tuned[0])
    return [*paths, save(tmp_path / "odd", tuned[0])]


def test_tensors_that_do_not_fit(tmp_path):
    cases = {
        "missing": (lambda sd: sd.pop("scale"), CheckpointError, r"odd: .*1 missing \(scale\)"),
        "extra": (lambda sd: sd.update(more=torch.ones(2)), CheckpointError, r"odd: .*1 extra \(more\)"),
        "shape": (lambda sd: sd.update({"scale": torch.ones(1)}), ShapeError, r"odd: scale has shape \(1,\)"),
        "vocabulary": (
            lambda sd: sd.update({"model.embed_tokens.weight": torch.ones(51, 16)}), ShapeError, "vocabulary resized",
        ),
        "dtype": (lambda sd: sd.update({"scale": torch.tensor(1)}), CheckpointError, "odd: scale is torch.int64"),
    }  # fmt: skip
    for name, (change, error, message) in cases.items():
        with pytest.raises(error, match=message):
            make_plan(config_for(changed(tmp_path / name, change)), 10**9)


def tied(tmp_path, heads):
    """Base and two experts with tied embeddings; `heads[i]` says whether, and how, the copy is stored."""
    base = state_dict(0)
    members = [base, tuned_state_dict(base, 1), tuned_state_dict(base, 2)]
    paths = []
    for i, (tensors, head) in enumerate(zip(members, heads, strict=True)):
        if head:
            tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        paths.append(save(tmp_path / f"m{i}", tensors, config={"tie_word_embeddings": True}))
    return paths


@pytest.mark.parametrize("heads", [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)], ids=str)
def test_tied_heads_are_not_tensors_of_their_own(tmp_path, heads):
    plan = make_plan(config_for(tied(tmp_path, heads)), 10**9)
    assert "lm_head.weight" not in plan.tensors
    assert len(plan.copies) == sum(heads)


def test_untied_heads_are(tmp_path):
    base = state_dict(0) | {"lm_head.weight": torch.ones(50, 16)}
    paths = [save(tmp_path / f"m{i}", base, config={"tie_word_embeddings": False}) for i in range(2)]
    assert "lm_head.weight" in make_plan(config_for(paths), 10**9).tensors


def test_order_is_that_of_the_base_and_passes_are_counted(tmp_path):
    paths, _, _ = family(tmp_path, shards=(2, 2, 3))
    plan = make_plan(config_for(paths), 10**9)
    assert list(plan.tensors) == list(plan.base.tensors)
    files = {file.path: file for file in plan.input_files()}
    for path in paths[:2]:  # split and sorted alike: read once, front to back
        assert [files[file].passes for file in sorted(path.glob("*.safetensors"))] == [1, 1]
    assert max(files[file].passes for file in paths[2].glob("*.safetensors")) > 1
    assert sum(file.bytes_read for file in files.values()) == plan.bytes_read


def test_a_base_that_is_a_model_is_read_once(tmp_path):
    paths, _, _ = family(tmp_path)
    plan = make_plan(config_for([paths[0], *paths], "linear"), 10**9)
    assert [checkpoint.path for checkpoint in plan.inputs] == [*paths]
    assert plan.bytes_read == 3 * plan.bytes_written - 2 * sum(
        tensor.bytes_read for tensor in plan.tensors.values() if tensor.treatment.kind == "base"
    )


def test_groups_hold_tensors_of_the_same_work(tmp_path):
    paths, _, _ = family(tmp_path)
    groups = make_plan(config_for(paths), 10**9).groups()
    assert ["model.layers.0.attn.weight", "model.layers.1.attn.weight"] in groups
    assert ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight"] in groups
    assert len(groups) == 8


def test_which_tensors_may_be_cut_into_rows(tmp_path):
    paths, _, _ = family(tmp_path)
    plan = make_plan(config_for(paths, exclude=("*.1.mlp*",)), 10**9)
    whole = [name for name in plan.tensors if not plan.row_wise(name)]
    assert whole == ["model.embed_tokens.weight", "model.layers.0.attn.weight", "model.layers.0.mlp.weight",
                     "model.layers.1.attn.weight"]  # fmt: skip
    average = make_plan(config_for(paths, "linear"), 10**9)
    assert all(average.row_wise(name) for name in average.tensors)


MEASURE = """
from contextlib import nullcontext
from checkpoints import save
from merging import lapack_alone
from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.plan import footprint, make_plan

def run(folder, case):
    shape, stored = case["shape"], getattr(torch, case.get("stored", "bfloat16"))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    tuned = [(base + 0.05 * torch.randn(shape, generator=generator)).to(stored) for _ in range(3)]
    base = base.to(stored)
    models = [save(folder / str(i), {"w": tensor}) for i, tensor in enumerate([base, *tuned])]
    config = MergeConfig(
        merge_method=case["method"], base_model=str(models[0]), models=tuple({"model": str(m)} for m in models[1:]),
        parameters=case.get("parameters", {}), dtype=case.get("dtype"), out_dtype=case.get("out_dtype"),
        exclude=tuple(case.get("exclude", ())),
    )
    plan = make_plan(config, 10**12)
    rows = case.get("rows")
    few = [tensor[:300, :300].contiguous() if tensor.ndim > 1 else tensor[:300] for tensor in (base, *tuned)]
    merge_tensors(few[0], few[1:], config)
    tile = [tensor[:rows] for tensor in (base, *tuned)]
    grown = []
    for solver in (lapack_alone(), nullcontext()):
        with solver:
            start()
            merge_tensors(tile[0], tile[1:], config, name="w", out_dtype=plan.tensors["w"].spec.dtype)
            grown.append(growth())
    needs = footprint(plan, "w", rows)
    assert needs.inputs == sum(tensor.nbytes for tensor in tile[: len(plan.tensors["w"].dtypes)])
    return {"growth": grown[0], "native": grown[1], "bound": needs.work}

folder = Path(sys.argv[1])
print(json.dumps([run(folder / str(i), case) for i, case in enumerate(json.loads(sys.argv[2]))]))
"""


MEASURED = [
    {"method": "linear", "shape": (2048, 2048)},
    {"method": "linear", "shape": (2048, 2048), "rows": 1000},
    {"method": "task_arithmetic", "shape": (2048, 2048), "stored": "float32", "out_dtype": "float16"},
    {"method": "task_arithmetic", "shape": (2048, 2048), "stored": "float64"},
    {"method": "task_arithmetic", "shape": (2048, 2048), "stored": "float32", "dtype": "float16"},
    {"method": "linear", "shape": (2048, 2048), "exclude": ("*",), "out_dtype": "float32"},
    {"method": "tsvm", "shape": (1 << 22,)},
    {"method": "tsvm", "shape": (640, 768)},
    {"method": "tsvm", "shape": (6000, 384), "stored": "float32"},
    {"method": "tsvm", "shape": (512, 600), "stored": "float64"},
    {"method": "rtsvm", "shape": (768, 640), "parameters": {"density": 0.3}},
    {"method": "rtsvm", "shape": (384, 6000), "parameters": {"rank": "energy"}, "out_dtype": "float32"},
    {
        "method": "rtsvm",
        "shape": (600, 512),
        "parameters": {"workspace": "1MB", "outlier_weighting": "damp", "rank": "fixed"},
    },
    {
        "method": "rtsvm",
        "shape": (64, 30000),
        "parameters": {"workspace": "1MB", "outlier_statistic": "signed", "rank": "shared", "prune_first": True},
    },
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case needs, measured one after the other in one process."""
    answers = measured(MEASURE, str(tmp_path_factory.mktemp("measured")), json.dumps(MEASURED))
    return dict(zip(map(str, MEASURED), answers, strict=True))


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_measured_memory_is_below_the_footprint(found, case):
    got = found[str(case)]
    assert got["bound"] / 3 < got["growth"] < got["bound"]
    assert got["native"] < got["bound"]
