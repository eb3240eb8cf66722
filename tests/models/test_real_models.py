"""Merges of real models are loaded back and run, and every tensor is what plain PyTorch makes of it."""

import pytest
import torch
from families import FAMILIES, assert_runs, assert_same, fine_tune, load

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_state_dicts, verify_output

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """A base and two fine-tunes of it, each a step away: the family, their folders, and what loads from these."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / name for name in ("base", "first", "second")]
    for seed, path in enumerate(paths):
        model = family.build()
        (fine_tune(model, family, seed) if seed else model).save_pretrained(path, **family.saving)
    return family, paths, [load(family, path) for path in paths]


def merge(paths, method, out, **options):
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], **options)
    return merge_checkpoints(config, out, shard_size="50KB")


def test_task_arithmetic_is_that_of_plain_pytorch(models, tmp_path):
    family, paths, (base, *tuned) = models
    merge(paths, "task_arithmetic", tmp_path / "out", alpha=0.7)
    merged = load(family, tmp_path / "out")
    assert_runs(merged, base, family)
    start, *others = (model.state_dict() for model in (base, *tuned))
    expected = {name: t + 0.7 * sum(other[name] - t for other in others) for name, t in start.items()}
    assert all(not torch.equal(expected[name], t) for name, t in start.items() if t.is_floating_point())
    assert_same(merged, expected, 1e-6)
    assert verify_output(tmp_path / "out", inputs=True).ok


@pytest.mark.parametrize("method", ["ties", "tsvm", "rtsvm"])
def test_files_and_memory_give_the_same(models, tmp_path, method):
    """Experts are packed in memory and one by one in most files; some names differ, too."""
    family, paths, (base, *tuned) = models
    merge(paths, method, tmp_path / "out")
    merged = load(family, tmp_path / "out")
    assert_runs(merged, base, family)
    in_memory = merge_state_dicts(base, tuned, method)
    assert_same(merged, in_memory.state_dict, 1e-5)
    packed = [name for name, report in in_memory.reports.items() if report.blocks and name.endswith("_proj")]
    assert len(packed) == family.packed
