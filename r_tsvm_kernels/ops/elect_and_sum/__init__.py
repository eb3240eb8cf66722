"""The element-wise merges: sparsify the task vectors, elect a sign, sum or average, add to the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import (
    accumulation_dtype,
    check_factors,
    check_group,
    check_like,
    check_mask,
    check_out_dtype,
    check_plain,
    numbers_of,
)
from ..magnitude_select import MagnitudeSelection
from ..random_mask import checked_draw
from .ranked import RankedSparsifier

Election = Literal["none", "sum", "count", "unweighted"]


@dataclass(frozen=True)
class Sparsifier:
    """Which elements of a task vector survive, and how they are rescaled; the others become 0.

    An element survives if all conditions hold. With n elements, density d and k(d) = `kept_count(d, n)`:

    - TIES trims (Yadav et al., arXiv 2306.01708): ``largest`` selects k(d) magnitudes.
    - Model Breadcrumbs (Davari, Belilovsky, arXiv 2312.06795) also drops the fraction gamma of the largest magnitudes:
      ``largest`` selects k(d + gamma), ``outliers`` k(gamma).
    - DARE (Yu et al., arXiv 2311.03099): ``keep_probability = d``, ``rescale = 1 / d``, one ``substream`` per task.
    - DELLA drops by rank (Deep et al., arXiv 2406.11617): ``ranked``, one ``substream`` per task.
    - SCE selects (Wan et al., arXiv 2408.07990): the same ``mask`` for all tasks.

    Attributes:
        largest: survivors, selected by ``|tuned[t] - base|`` in the accumulation dtype; None for all.
        outliers: elements that do not survive, selected in the same way; None for none.
        keep_probability: of surviving, see `random_mask`; 1 draws nothing.
        seed: of the random mask, 0 <= seed < 2**64.
        substream: of the random mask, 0 <= substream < 2**32.
        rescale: factor of the survivors, finite.
        ranked: survivors by chance, with a probability by rank instead of one for all; drawn from the words of the same
            random mask. None for all.
        mask: bool, of the tensors' shape and device: survivors are True; None for all.
        first: index of the first element in the random mask, a multiple of 4: not 0 for a piece of a larger tensor.

    Raises:
        ConfigError: a number out of range, a field of another type, or `keep_probability` beside `ranked`.
        DTypeError: `mask` is not a plain tensor.

    Examples:
        >>> Sparsifier(keep_probability=0.25, rescale=4.0, seed=7).keep_probability  # DARE
        0.25
    """

    largest: MagnitudeSelection | None = None
    outliers: MagnitudeSelection | None = None
    keep_probability: float = 1.0
    seed: int = 0
    substream: int = 0
    rescale: float = 1.0
    ranked: RankedSparsifier | None = None
    mask: Tensor | None = None
    first: int = 0

    def __post_init__(self) -> None:
        draw = checked_draw(self.keep_probability, self.seed, self.substream, "Sparsifier")
        (rescale,) = numbers_of(self.rescale, 1, "Sparsifier: rescale")
        names = ("keep_probability", "seed", "substream", "rescale")
        for name, value in zip(names, (*draw, rescale), strict=True):
            object.__setattr__(self, name, value)
        for name, kind in (
            ("largest", MagnitudeSelection),
            ("outliers", MagnitudeSelection),
            ("ranked", RankedSparsifier),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise ConfigError(f"Sparsifier: {name} must be a {kind.__name__} or None, got {type(value).__name__}")
        if self.ranked is not None and self.keep_probability != 1:
            raise ConfigError(f"Sparsifier: with ranked, keep_probability must be 1, got {self.keep_probability}")
        if self.mask is not None:
            check_plain(self.mask, "Sparsifier: mask")
        if type(self.first) is not int or not 0 <= self.first < 2**63 or self.first % 4:
            raise ConfigError(f"Sparsifier: first must be a multiple of 4 from 0 on, got {self.first!r}")


@dispatch.op(
    "Sparse task vectors and elections", cpu=("cpu", "torch"), cuda=("cuda", "triton", "torch"), small={"BLOCK": 128}
)
def elect_and_sum(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float] | float,
    *,
    elect: Election = "none",
    normalize: bool = False,
    alpha: float = 1.0,
    sparsifiers: Sequence[Sparsifier] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``base + alpha * combined``, where `combined` merges the sparsified, weighted task vectors.

    With ``v_t = w_t * rescale_t * (tuned[t] - base)`` where an element survives `sparsifiers` and 0 elsewhere, for
    each element on its own:

    - ``elect="none"``: combined = sum(v_t). `normalize` divides the weights by their sum (of all tasks). This is task
      arithmetic (Ilharco et al., arXiv 2212.04089), and the weighted average of models where the base is 0.
    - ``elect="sum"``: the elected sign is that of sum(v_t), + where the votes cancel; combined = sum of the v_t that do
      not have the other sign. `normalize` divides by the sum of the w_t with v_t of the elected sign, by 1 where these
      cancel: the disjoint mean of TIES, weighted (Yadav et al., arXiv 2306.01708).
    - ``elect="count"``: the same with the sign that more of the v_t have, + where they are equally many.
    - ``elect="unweighted"``: the same with the sign of the sum of the surviving differences, neither weighted nor
      rescaled; a v_t is on the side of its difference. SCE, erasing minority signs (Wan et al., arXiv 2408.07990).

    Sums run over the tasks from first to last in the accumulation dtype; ``w_t * rescale_t`` is rounded to it once.
    Votes are float64 whatever the dtype is, and a negative one counts ``1 - 2**-39`` of itself: so + wins where votes
    cancel up to rounding, and the elected sign depends neither on the backend nor on the order of the tasks.
    Where ``alpha * combined`` is 0 the base comes back bit for bit, -0.0 included. NaN and infinity in a surviving
    element reach the result; nothing is raised for them here.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        weights: T numbers, of any sign, or one for all tasks.
        elect: ``none``, ``sum``, ``count`` or ``unweighted``.
        normalize: divide by weights, as above.
        alpha: scale of the merged task vector.
        sparsifiers: one for each task; None keeps every element.
        out_dtype: dtype that the result is rounded to once, float64, float32, float16 or bfloat16; what does not fit
            becomes infinite. None means the accumulation dtype.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        A new tensor in `out_dtype`; without one float32 (float64 if any input is float64), the accumulation dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match; ranks, masks and `out_dtype` are checked, too.
        ConfigError: an unknown election, a wrong number of weights or sparsifiers, a number that is not finite or does
            not fit the accumulation dtype, weights that cancel and are to be normalized without an election, or
            ranks in an unweighted election.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> base, tuned = torch.zeros(3), [torch.tensor([4.0, 1.0, 0.0]), torch.tensor([-1.0, 3.0, 2.0])]
        >>> elect_and_sum(base, tuned, [1.0, 1.0])
        tensor([3., 4., 2.])
        >>> elect_and_sum(base, tuned, [1.0, 1.0], elect="sum", normalize=True)
        tensor([4., 2., 2.])
    """
    check_group(base, tuned, op="elect_and_sum")
    if elect not in get_args(Election):
        raise ConfigError(f"elect must be {', '.join(get_args(Election))}, got {elect!r}")
    weights = numbers_of(weights, len(tuned), "elect_and_sum: weights")
    (alpha,) = numbers_of(alpha, 1, "elect_and_sum: alpha")
    rules = _one_per_task(sparsifiers, len(tuned))
    if normalize and elect == "none":
        weights = normalized_shares(weights)
    dtype = accumulation_dtype(base, *tuned)
    check_out_dtype(out_dtype, "elect_and_sum")
    factors = [weight * rule.rescale for weight, rule in zip(weights, rules, strict=True)]
    for label, values in (("weights", weights), ("weights times rescale", factors), ("alpha", [alpha])):
        check_factors(values, dtype, f"elect_and_sum: {label}")
    for index, rule in enumerate(rules):
        if rule.ranked is not None:
            check_like(rule.ranked.ranks, base, f"elect_and_sum: tensor of ranks of task {index}")
            if elect == "unweighted":
                raise ConfigError(f"elect_and_sum: task {index} is selected by ranks, in an unweighted election")
        if rule.mask is not None:
            check_mask(rule.mask, base, f"elect_and_sum: mask of task {index}")
    run = dispatch.select("elect_and_sum", base, *tuned, backend=backend)
    result: Tensor = run(base, tuned, weights, rules, elect, normalize, alpha, out_dtype or dtype)
    return result


def _one_per_task(sparsifiers: Sequence[Sparsifier] | None, tasks: int) -> list[Sparsifier]:
    if sparsifiers is None:
        return [Sparsifier()] * tasks
    if not isinstance(sparsifiers, Sequence) or not all(isinstance(own, Sparsifier) for own in sparsifiers):
        raise ConfigError(
            f"elect_and_sum: sparsifiers must be a list of Sparsifier, one for each task, got {sparsifiers!r}"
        )
    if len(sparsifiers) != tasks:
        raise ConfigError(f"elect_and_sum: {tasks} tasks but {len(sparsifiers)} sparsifiers; give one for each task")
    return list(sparsifiers)


def least_divisor(weights: Sequence[float], dtype: torch.dtype) -> float:
    """Return the magnitude up to which a sum of some of the weights, in `dtype`, is 0 up to rounding.

    0 where no weight is negative: nothing cancels.
    """
    if min(weights) >= 0:
        return 0.0
    return len(weights) * torch.finfo(dtype).eps * sum(abs(weight) for weight in weights)


def normalized(weights: Sequence[float], advice: str = "set normalize: false") -> list[float]:
    """Divide weights by their sum.

    Raises:
        ConfigError: they sum to 0. The message ends with `advice`.
    """
    total = sum(weights)
    if math.isinf(total):
        largest = max(map(abs, weights))
        return normalized([weight / largest for weight in weights], advice)
    if abs(total) < 1e-8:
        raise ConfigError(f"the weights {list(weights)} sum to 0 and cannot be normalized; {advice}")
    return [weight / total for weight in weights]


def normalized_shares(weights: Sequence[float]) -> list[float]:
    """Divide the weights of task vectors by their sum; weights that are all 0 stay, and nothing is added to the base.

    Raises:
        ConfigError: other weights sum to 0.

    Examples:
        >>> normalized_shares([1.0, 3.0]), normalized_shares([0.0, 0.0])
        ([0.25, 0.75], [0.0, 0.0])
    """
    return normalized(weights) if any(weights) else list(weights)
