"""Candidates that mergekit-evolve draws from models made of parts: its genomes, merged by mergekit."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from r_tsvm_kernels import Parts
from r_tsvm_kernels.cli import main

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers

PAGE = (Path(__file__).parents[2] / "docs" / "parts.md").read_text()
EXAMPLE = PAGE[PAGE.index("## Inside mergekit-evolve") :]
COMMANDS = re.search(r"```bash\n(.*?)```", EXAMPLE, re.DOTALL)[1].splitlines()
GENOME = yaml.safe_load(re.search(r"```yml\n(.*?)```", EXAMPLE, re.DOTALL)[1])
TASKS = ("math", "code", "chat")
LAYERS = 4


def llama(seed):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (seed > 0)
    return model.bfloat16()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and what the first commands of the documentation make of them."""
    out = tmp_path_factory.mktemp("evolve")
    for seed, name in enumerate(("base", *TASKS)):
        llama(seed).save_pretrained(out / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        for command in COMMANDS[:4]:
            program, *arguments = command.split()
            assert program == "rtsvm" and main([*arguments, "--quiet"]) == 0
    return out


def candidate(genome, genotype, out):
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = genome.genotype_merge_config(genotype)
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False))
    return config, load_file(out / "model.safetensors")


def genome_of(**changes):
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome

    return ModelGenome(EvolMergeConfiguration.model_validate({**GENOME, "genome": GENOME["genome"] | changes}).genome)


def rounding_of(exact, name, models, weights):
    """What bfloat16 may change: each model, as stored, and the steps of mergekit's sum, of the size of its summands."""
    base, *tuned = (model[name].double() for model in models)
    summands = [abs(w) * (x.abs() + base.abs()) for w, x in zip(weights, tuned, strict=True)]
    return torch.finfo(torch.bfloat16).eps * (exact.double().abs() + base.abs() + sum(summands))


@pytest.fixture(scope="module")
def models(folder):
    return [load_file(folder / name / "model.safetensors") for name in ("base", *(f"models/{task}" for task in TASKS))]


def test_the_example_of_the_documentation(folder, models, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    genome, parts = genome_of(), Parts.load("parts")
    assert genome.initial_genotype().flatten().tolist() == pytest.approx([1 / 3] * 3)
    for number, weights in enumerate(([0.7, -0.5, 1.3], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0])):
        _, found = candidate(genome, torch.tensor(weights).reshape(1, 3, 1, 1), tmp_path / f"out{number}")
        for name, exact in parts.state_dict(weights).items():
            assert found[name].dtype == torch.bfloat16
            error = (found[name].double() - exact.double()).abs()
            assert bool((error <= rounding_of(exact, name, models, weights)).all()), name
            change = (exact.double() - models[0][name].double()).norm()
            assert name.endswith("norm.weight") or float(error.norm()) < 0.1 * float(change)


@pytest.mark.parametrize("smooth", [False, True], ids=["slices", "smooth"])
def test_the_best_candidate_is_merged_from_the_parts(folder, models, tmp_path, monkeypatch, smooth):
    """By the last commands of the documentation, also if layers and filters have weights of their own."""
    monkeypatch.chdir(folder)
    genome = genome_of(layer_granularity=2, smooth=smooth, filters=["mlp"])
    genotype = torch.randn(2, 3, 2, 1, generator=torch.Generator().manual_seed(3))
    config, found = candidate(genome, genotype, tmp_path / "theirs")
    Path("storage").mkdir(exist_ok=True)
    Path("storage/best_config.yaml").write_text(config.to_yaml())
    replace, merge = COMMANDS[-2:]
    subprocess.run(replace, shell=True, check=True)  # our own text
    out = tmp_path / "merged"
    assert main([*merge.split()[1:-1], "--quiet", "--out-dtype", "float32", str(out)]) == 0
    ours, parts = load_file(out / "model.safetensors"), [load_file(f"parts/{task}.safetensors") for task in TASKS]
    for name, tensor in ours.items():
        after = name.startswith(("model.norm", "lm_head")) and not smooth  # of the last slice; a gradient's first value
        layer = int(match[1]) if (match := re.search(r"layers\.(\d)", name)) else (LAYERS - 1) * after
        position = layer / (LAYERS - 1) if smooth else layer // 2
        own = genotype[:, :, 0 if "mlp" in name else 1, 0].double()
        weights = (own[0] + (own[1] - own[0]) * position).tolist()
        sums = [w * dense(part, name) for w, part in zip(weights, parts, strict=True)]
        exact = models[0][name].double() + sum(sums)
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-6)
        error = (found[name].double() - exact).abs()
        assert bool((error <= rounding_of(exact, name, models, weights)).all()), name


def dense(part, name):
    return part[name].double() if name in part else part[f"{name}:left"].double() @ part[f"{name}:right"].double()
