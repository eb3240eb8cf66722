"""What the tests of the merge methods share: inputs, and the comparison of a method with its float64 truth."""

import hashlib
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

import torch

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.ops import random_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(24, 17), (61,), (1, 7), (5, 1), (), (3, 5, 7)]


def group(shape=(24, 17), tasks=3, dtype=torch.float32, seed=0):
    """Heavy-tailed task vectors without ties."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tuned = [base + 0.05 * torch.randn(shape, generator=generator) ** 3 for _ in range(tasks)]
    return base.to(dtype), [tensor.to(dtype) for tensor in tuned]


def tasks_of(method, wanted):
    """So many tasks, or as many as the method takes."""
    return METHODS[method].tasks or wanted


def doubles(base, tuned):
    """The same tensors as float64 arrays."""
    return base.double().numpy(), [tensor.double().numpy() for tensor in tuned]


def merge(method, base, tuned, name="w", weights=None, **options):
    """Merge; the result is not rounded to the dtype of the inputs."""
    config = MergeConfig(method, weight=weights, **options)
    first = tuned[0] if base is None else base
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return merge_tensors(base, tuned, config, name=name, out_dtype=wide).weight


def update_error(got, base, exact):
    """Error beyond one rounding of the merged weight, relative to the update; `exact` is the weight in float64."""
    exact = torch.as_tensor(exact)
    update = float((exact - base.double()).norm())
    excess = float((got.double() - exact).norm()) - torch.finfo(got.dtype).eps / 2 * float(exact.norm())
    return max(0.0, excess) / update if update else float((got.double() - base.double()).norm())


def drawn(shape, probability, seed, task, name="w"):
    """The random mask of a task, from the documented seed of the tensor; `random_mask` has tests of its own."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return random_mask(
        shape, probability, seed=int.from_bytes(digest, "little"), substream=task, backend="torch"
    ).numpy()


@contextmanager
def lapack_alone():
    """Do without the eigensolver of two stages, which needs less memory than LAPACK: bounds are for both."""
    with ExitStack() as stack:
        for name in ("leading_right_vectors", "two_stage"):
            module = import_module(f"r_tsvm_kernels.linalg.{name}")
            stack.enter_context(patch.object(module, "two_stage_runs", lambda device: False))
        yield
