"""What is left of the tests of Triton kernels in the interpreter shares; others take `variants.every_backend`."""

from importlib import import_module

import pytest
import torch

from r_tsvm_kernels import backends

STATE = backends.triton_interpreter_state()

interpreted = [
    pytest.mark.skipif(STATE != backends.READY, reason=f"needs Triton's interpreter: {STATE}"),
    # The interpreter computes with numpy, which warns about overflow and NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

if STATE == backends.READY:
    import triton.language as tl
    from triton.runtime import interpreter

    # A third of the interpreter's time goes into patching the language anew for each call inside a kernel.
    def patch_once(fn, patch=interpreter._patch_lang):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MIXES = [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32),
    (torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64), (torch.float64, torch.float16),
]  # fmt: skip
TINY = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))


def kernel(op):
    return import_module(f"r_tsvm_kernels.ops.{op}.triton_kernel")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and several per program, even for the small tensors that the interpreter can handle."""
    for op in (
        "task_statistics", "magnitude_select", "reweight_prune", "add_update", "random_mask", "elect_and_sum",
        "task_gram", "task_spread", "ranked_mask",
    ):  # fmt: skip
        monkeypatch.setattr(kernel(op), "BLOCK", 128)
    monkeypatch.setattr(kernel("magnitude_select"), "PROGRAMS", 2)
    monkeypatch.setattr(kernel("task_gram"), "STEPS", 2)


def nasty(dtype):
    """Yield named tensors that are hard to select from."""
    tiny = TINY[dtype]
    yield "all equal", torch.full((131,), -0.3, dtype=dtype)
    yield "all zero", torch.zeros(70, dtype=dtype)
    yield "negative zero", torch.tensor([0.0, -0.0, 1.0, -0.0] * 40, dtype=dtype)
    yield "ties", torch.randint(-3, 4, (200,)).to(dtype)
    yield "subnormal", torch.arange(-90, 90).double().mul(tiny).to(dtype)
    yield "largest", torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, 1.0, tiny, 0.0], dtype=dtype)
    yield "neighbours", (1 + torch.arange(300).double() % 7 * torch.finfo(dtype).eps).to(dtype)
    yield "wide", (torch.randn(150).double() * 10.0 ** torch.randint(-4, 4, (150,))).to(dtype)
    yield "one", torch.tensor([-2.0], dtype=dtype)


def some_counts(numel):
    return sorted({1, numel // 2, numel} - {0})


def pair(shape, mix=(torch.float32, torch.float32), tasks=2, scale=0.05):
    base = torch.randn(shape, dtype=torch.float64)
    tuned = [(base + scale * torch.randn(shape)).to(mix[(task + 1) % 2]) for task in range(tasks)]
    return base.to(mix[0]), tuned
