"""mergekit's sparsifiers and its task arithmetic with our kernels.

Every function has the signature of the one that it replaces, and returns None for inputs that mergekit should handle.
Counts and ranks are mergekit's. Sums are ours: in float32 or float64 for every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge, TensorGroup
from torch import Tensor

from ...methods.sparsify import kept_model, l1_norm
from ...ops import Sparsifier, della_probabilities, elect_and_sum, magnitude_select, ranked_mask
from ...ops._checks import FLOAT_DTYPES
from . import INSTALLATION

# Makes the Sparsifier of a difference x - base; returns None for parameters that mergekit should handle.
Rule = Callable[[Tensor, Tensor | None], Sparsifier | None]

DEVICES = ("cpu", "cuda")
RULE_PARAMETERS = ("density", "gamma", "epsilon")
SMALLEST_NORM = 1e-7  # mergekit does not rescale below it


# --- which elements survive: one rule per sparsifier ----------------------------------------------------------


def _keep_largest(x: Tensor, base: Tensor | None, density: float) -> Sparsifier | None:
    keep = max(1, int(density * x.numel())) if density > 0 else 0
    return _between(x, base, keep, 0)


def _keep_middle(x: Tensor, base: Tensor | None, density: float, gamma: float) -> Sparsifier | None:
    if not (density >= 0 and gamma >= 0):
        return None
    keep, drop = int(density * x.numel()), int(gamma * x.numel())
    reach = min(x.numel(), keep + drop)  # mergekit prefers dropping fewer outliers to keeping fewer elements
    return _between(x, base, reach, reach - keep)


def _between(x: Tensor, base: Tensor | None, reach: int, drop: int) -> Sparsifier:
    """Keep the `reach` largest magnitudes, except the `drop` largest."""
    INSTALLATION.count("magnitude_select")
    if drop == 0:
        return Sparsifier(largest=magnitude_select(x, reach, base=base))
    largest, outliers = magnitude_select(x, [reach, drop], base=base)
    return Sparsifier(largest=largest, outliers=outliers)


def _keep_random(x: Tensor, base: Tensor | None, density: float) -> Sparsifier | None:
    return Sparsifier(keep_probability=density, seed=_seed()) if density >= 0 else None


def _keep_by_rank(x: Tensor, base: Tensor | None, density: float, epsilon: float) -> Sparsifier | None:
    if density <= 0:
        return _keep_largest(x, base, density)
    if x.ndim not in (1, 2) or not (epsilon >= 0 and density + epsilon < 1 and density - epsilon > 0):
        return None  # mergekit ranks along dimension 1, and says what is wrong with epsilon
    INSTALLATION.count("ranked_mask")
    return Sparsifier(mask=ranked_mask(x, della_probabilities(x.shape[-1], density, epsilon), seed=_seed(), base=base))


def _seed() -> int:
    """Draw a seed from torch's generator, which mergekit's --random-seed sets."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


RULES: dict[str, Callable[..., Sparsifier | None]] = {
    "magnitude": _keep_largest,
    "magnitude_outliers": _keep_middle,
    "random": _keep_random,
    "della_magprune": _keep_by_rank,
}


# --- in place of the functions of mergekit.sparsify -----------------------------------------------------------


def magnitude(tensor: Tensor, density: float, rescale_norm: str | None = None) -> Tensor | None:
    """Keep the largest magnitudes, at least one."""
    return _sparsified(tensor, density, partial(_keep_largest, density=density), rescale_norm)


def magnitude_outliers(
    tensor: Tensor, density: float, rescale_norm: str | None = None, gamma: float = 0.01
) -> Tensor | None:
    """Keep the largest magnitudes below the fraction `gamma` of outliers."""
    return _sparsified(tensor, density, partial(_keep_middle, density=density, gamma=gamma), rescale_norm)


def bernoulli(tensor: Tensor, density: float, rescale_norm: str | None = None) -> Tensor | None:
    """Keep each element by chance."""
    return _sparsified(tensor, density, partial(_keep_random, density=density), rescale_norm)


def della_magprune(tensor: Tensor, density: float, epsilon: float, rescale_norm: str | None = None) -> Tensor | None:
    """Keep each element by chance, more likely the larger it is in its row."""
    return _sparsified(tensor, density, partial(_keep_by_rank, density=density, epsilon=epsilon), rescale_norm)


def _sparsified(tensor: Tensor, density: float, rule: Rule, norm: str | None) -> Tensor | None:
    if density >= 1:
        return tensor
    if not accepted(tensor):
        return None
    sparsifier = rule(tensor, None)
    if sparsifier is None:
        return None
    masked = _masked(tensor, sparsifier)
    factor = _rescale(tensor, masked, norm)
    return None if factor is None else (masked * factor).to(tensor.dtype)


def _masked(delta: Tensor, sparsifier: Sparsifier) -> Tensor:
    INSTALLATION.count("elect_and_sum")
    return elect_and_sum(zeros_like(delta), [delta], [1.0], sparsifiers=[sparsifier])


def _rescale(delta: Tensor, masked: Tensor, norm: str | None) -> float | None:
    """Return the factor that restores a norm; None if it is not finite."""
    if norm is None:
        return 1.0
    order = {"l1": 1.0, "l2": 2.0, "linf": math.inf}[norm]
    before, after = (float(torch.linalg.vector_norm(tensor, order, dtype=torch.float64)) for tensor in (delta, masked))
    return _factor(before, after)


def _factor(before: float, after: float) -> float | None:
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    return 1.0 if min(before, after) < SMALLEST_NORM else before / after


# --- in place of GeneralizedTaskArithmeticMerge.merge_group ----------------------------------------------------


def merge_group(method: GeneralizedTaskArithmeticMerge, group: TensorGroup, /, **parameters: Any) -> Tensor | None:
    """Sparsify the task vectors, elect signs, sum and add to the base, without storing the task vectors."""
    entries = group.non_base
    if not entries or not accepted(*(entry.tensor for entry in group.entries)):
        return None
    base: Tensor = group.base.tensor
    tuned = [entry.tensor for entry in entries]
    weights = [float(parameters["weight"][entry.id]) for entry in entries]
    alpha = float(parameters["lambda"])
    if not all(math.isfinite(number) for number in (*weights, alpha)):
        return None
    sparsifiers: list[Sparsifier] = []
    for entry in entries if method.sparsification_method else ():
        own = {name: parameters[name][entry.id] for name in RULE_PARAMETERS if name in parameters}
        sparsifier = _sparsifier(entry.tensor, base, method.sparsification_method.value, own, parameters["rescale"])
        if sparsifier is None:
            return None
        sparsifiers.append(sparsifier)

    elect, normalize = method.consensus_method, parameters["normalize"]
    if normalize and not elect:
        total, normalize = sum(weights), False
        weights = [weight / total for weight in weights] if abs(total) >= 1e-8 else weights
    INSTALLATION.count("elect_and_sum")
    merged = elect_and_sum(
        base, tuned, weights,
        elect=elect.value if elect else "none", normalize=normalize, alpha=alpha, sparsifiers=sparsifiers or None,
    )  # fmt: skip
    return merged.to(base.dtype)


def _sparsifier(x: Tensor, base: Tensor, method: str, own: dict[str, float], rescale: bool) -> Sparsifier | None:
    if own["density"] >= 1:
        return Sparsifier()
    sparsifier = RULES[method](x, base, **own)
    if sparsifier is None or not rescale:
        return sparsifier
    INSTALLATION.count("elect_and_sum")
    factor = _factor(l1_norm(base, x), l1_norm(base, kept_model(base, x, sparsifier)))
    return None if factor is None else replace(sparsifier, rescale=factor)


def zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros of the tensor's shape, expanded from one row."""
    return tensor.new_zeros(tensor.shape[-1:]).expand_as(tensor)


def accepted(*tensors: Tensor) -> bool:
    """Whether our kernels support these tensors; they have no gradients."""
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not differentiated and all(
        tensor.dtype in FLOAT_DTYPES and tensor.device.type in DEVICES and tensor.numel() > 0 for tensor in tensors
    )
