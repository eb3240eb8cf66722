"""Cases of `elect_and_sum`, and the sparsifiers that its tests use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import get_args

import torch
from torch import Tensor

from .._cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MIXES,
    Case,
    around_ties,
    group,
    groups,
    seeded,
    spoiled,
    unaligned,
)
from .._checks import FLOAT_DTYPES, accumulation_dtype
from ..magnitude_ranks import magnitude_ranks
from ..magnitude_select import MagnitudeSelection, kept_count, magnitude_select
from ..random_mask import random_mask
from . import Election, Sparsifier
from .ranked import RankedSparsifier, della_probabilities

# See `_cases`.
WIDTHS = {"elect_and_sum_kernel": (8, 8), "tie_kernel": (8, 8)}

ELECTIONS = get_args(Election)
KINDS = ("all", "ties", "breadcrumbs", "dare", "mask", "della", "everything", "mixture")
WEIGHTS = [1.0, 0.5, 2.0, -0.25, 0.75, 1.5, 0.125, 3.0]
# With these weights many sums of whole numbers are 0 except for rounding.
CANCELLING = [0.3, 0.1, 0.2, 0.6, -0.3, -0.1, 0.7, 0.9]


def sparsifiers(
    base: Tensor, tuned: Sequence[Tensor], kind: str | Sequence[str], density: float = 0.4
) -> list[Sparsifier]:
    """Return one sparsifier for each task, of one kind or of a kind for each; a "mixture" has all kinds."""
    dtype = accumulation_dtype(base, *tuned)
    kinds = [kind] * len(tuned) if isinstance(kind, str) else kind
    if kind == "mixture":
        kinds = [KINDS[(task + 1) % 7] for task in range(len(tuned))]
    return [
        _sparsifier(t.to(dtype) - base.to(dtype), own, task, density)
        for task, (t, own) in enumerate(zip(tuned, kinds, strict=False))
    ]


def _sparsifier(delta: Tensor, kind: str, task: int, density: float) -> Sparsifier:
    def top(fraction: float) -> MagnitudeSelection:
        return magnitude_select(delta, kept_count(fraction, delta.numel()), backend="torch")

    def some(fraction: float, seed: int) -> Tensor:
        return random_mask(delta.shape, fraction, seed=seed, substream=task, device=delta.device, backend="torch")

    if kind == "ties":
        return Sparsifier(largest=top(density))
    if kind == "breadcrumbs":
        return Sparsifier(largest=top(density + 0.1), outliers=top(0.1))
    if kind == "dare":
        return Sparsifier(keep_probability=density, seed=7, substream=task, rescale=1 / density)
    if kind == "mask":
        return Sparsifier(mask=some(density, 5), rescale=-1.5)
    if kind == "della":
        chances = della_probabilities(delta.shape[-1], 0.5, 0.5 if task % 3 == 2 else 0.3)
        ranked = RankedSparsifier(magnitude_ranks(delta, backend="torch"), chances, rescale=task % 2 == 0)
        return Sparsifier(ranked=ranked, seed=2**63 + 1, substream=task, rescale=0.7)
    if kind == "everything":
        largest, outliers, mask = top(0.9), top(0.05), some(0.8, 6)
        return Sparsifier(largest, outliers, keep_probability=0.7, seed=2**63, rescale=0.3, mask=mask)
    return Sparsifier()


def rules_for(base: Tensor, tuned: Sequence[Tensor], elect: str, kind: str | Sequence[str]) -> list[Sparsifier]:
    """Return sparsifiers of a kind, without ranks if these are refused: in unweighted elections and for scalars."""
    found = (
        sparsifiers(base, tuned, kind) if base.ndim or kind not in ("della", "mixture") else [Sparsifier()] * len(tuned)
    )
    if elect == "unweighted":
        found = [Sparsifier() if own.ranked is not None else own for own in found]
    return found


def whole_numbers(shape: Sequence[int], tasks: int, random: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Return small whole numbers: sums are exact, and there are many ties, zeros and drawn elections."""
    base = torch.randint(-4, 5, tuple(shape), generator=random, device=random.device).float()
    steps = torch.randint(-2, 3, (tasks, *shape), generator=random, device=random.device)
    return base, [base + step for step in steps]


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield every election with every kind of sparsifier; ties at thresholds; votes that cancel; NaN and infinity."""
    random = seeded(device)
    combinations = list(product(ELECTIONS, (False, True), KINDS))
    base, tuned = whole_numbers((7, 31), 4, random)
    for elect, normalize, kind in combinations:
        options = {
            "elect": elect,
            "normalize": normalize,
            "alpha": 0.3,
            "sparsifiers": rules_for(base, tuned, elect, kind),
        }
        yield Case(f"{kind}, {elect}, {normalize}", (base, tuned, WEIGHTS[:4]), options)
    turn = cycle(combinations)
    for label, base, tuned in groups(device):
        elect, normalize, kind = next(turn)
        options = {"elect": elect, "normalize": normalize, "sparsifiers": rules_for(base, tuned, elect, kind)}
        yield Case(f"{label}, {elect}, {kind}", (base, tuned, WEIGHTS[:3]), options)
        options = {"elect": "sum", "normalize": True, "sparsifiers": rules_for(base, tuned, "sum", "mixture")}
        yield Case(f"{label}, sum, mixture", (base, tuned, WEIGHTS[:3]), options)
    for tasks, kind, elect in product((1, 2, 8), ("all", "ties", "mixture"), ELECTIONS):
        base, tuned = whole_numbers((17, 11), tasks, random)
        options = {"elect": elect, "normalize": tasks < 8, "sparsifiers": rules_for(base, tuned, elect, kind)}
        for weights in (WEIGHTS, CANCELLING):
            yield Case(f"{tasks} tasks, {kind}, {elect}, {weights[0]}", (base, tuned, weights[:tasks]), options)
    for dtype, elect in product(FLOAT_DTYPES, ELECTIONS):
        steps = torch.arange(-150, 150, dtype=FLOAT64, device=device)
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        tuned = [(steps * factor % 97 * tiny).to(dtype) for factor in (1, -3, 7)]
        options = {"elect": elect, "normalize": True}
        yield Case(f"subnormal {dtype}, {elect}", (torch.zeros_like(tuned[0]), tuned, WEIGHTS[:3]), options)
    for elect, place in product(ELECTIONS[:3], (4, 2**34 - 1024)):
        base, tuned = whole_numbers((9, 300), 4, random)
        rules = [replace(own, first=place) for own in sparsifiers(base, tuned, ["dare", "della", "everything", "all"])]
        yield Case(f"a piece from {place}, {elect}", (base, tuned, WEIGHTS[:4]), {"elect": elect, "sparsifiers": rules})
    yield from _roundings(device)
    yield from _thresholds(device)
    for elect, normalize in product(ELECTIONS, (False, True)):
        base, tuned = whole_numbers((13, 27), 6, random)
        own = sparsifiers(base, tuned, "breadcrumbs")[4]
        some = (torch.rand((27, 13), generator=random, device=device) < 0.6).mT
        rules = [
            Sparsifier(mask=some), Sparsifier(mask=some, rescale=-2.5), Sparsifier(mask=torch.zeros_like(some)),
            Sparsifier(mask=some, keep_probability=0.7, seed=2**63 + 5, substream=2, rescale=1 / 0.7),
            Sparsifier(mask=~some, largest=own.largest, outliers=own.outliers),
            rules_for(base, tuned, elect, "della")[5],
        ]  # fmt: skip
        for each in (rules, [Sparsifier(mask=some)] * 6):
            options = {"elect": elect, "normalize": normalize, "alpha": 0.3, "sparsifiers": each}
            yield Case(f"masks, {elect}, {normalize}", (base, tuned, [1.0, -0.5, 2.0, -3.0, 0.25, 4.0]), options)
        base, tuned = spoiled(device)
        for narrow in (None, FLOAT16, BFLOAT16):
            options = {"elect": elect, "normalize": normalize, "out_dtype": narrow}
            yield Case(f"NaN and infinity, {elect}, {normalize}, {narrow}", (base, tuned, WEIGHTS[:3]), options)
    for elect, (first, second) in product(ELECTIONS[:3], (MIXES[0], *MIXES[3:5])):
        base, tuned = group((11, 33), [first, second, first, second, first], random)
        rules = sparsifiers(base, tuned, "della")
        rules[2:] = [Sparsifier(keep_probability=0.3, rescale=3.0, substream=2), Sparsifier()]
        options = {"elect": elect, "normalize": True, "alpha": 0.5, "sparsifiers": rules}
        yield Case(f"ranks beside others, {elect}, {second}", (base, tuned, WEIGHTS[:4]), options)
    for label, base, tuned in unaligned(device):
        yield Case(label, (base, tuned, [1.0, 2.0]), {"elect": "sum"})
    yield from _models(random)


def _roundings(device: torch.device | str) -> Iterator[Case]:
    """Yield results that are rounded: ties of 16-bit formats, subnormals, and values beyond their range."""
    for wide, narrow in product((FLOAT32, FLOAT64), FLOAT_DTYPES):
        steps = around_ties(wide, narrow, device)
        tuned = [steps, torch.zeros_like(steps)]
        options = {"elect": "sum", "out_dtype": narrow}
        yield Case(f"{wide} rounded to {narrow}", (torch.zeros_like(tuned[0]), tuned, [1.0, 0.5]), options)
        yield Case(f"{wide} in {narrow}", (torch.zeros_like(tuned[0]), tuned, [1.0, 0.5]), {"out_dtype": narrow})


def _thresholds(device: torch.device | str) -> Iterator[Case]:
    """Yield ties at a threshold, only the first of which survive, and a threshold between two numbers of float32."""
    sign = 1 - 2 * (torch.arange(500, device=device) % 2)
    base, tuned = torch.zeros(500, device=device), [0.5 * sign]
    for dtype, field, ties in product((FLOAT32, FLOAT64), ("largest", "outliers"), (0, 1, 127, 128, 129, 500)):
        threshold = torch.tensor(0.5, dtype=dtype, device=device)
        selection = MagnitudeSelection(threshold, torch.tensor(ties, device=device))
        rules = [Sparsifier(**{field: selection})]  # type: ignore[arg-type]
        yield Case(f"the first {ties} ties, {field}, {dtype}", (base, tuned, 1.0), {"sparsifiers": rules})
    tuned = [torch.tensor([1.0, 1 + 2.0**-23, 1 + 2.0**-22], device=device)]
    between = torch.tensor(1 + 2.0**-24, dtype=FLOAT64, device=device)
    selection = MagnitudeSelection(between, torch.tensor(0, device=device))
    for rule in (Sparsifier(largest=selection), Sparsifier(outliers=selection)):
        yield Case("a threshold between two float32", (base[:3], tuned, 1.0), {"sparsifiers": [rule]})


def _models(random: torch.Generator) -> Iterator[Case]:
    """Yield merges of 8 and of 20 models, the most usual first."""
    variants = {"ties": "sum", "all": "none", "dare": "none", "della": "sum", "mask": "unweighted", "everything": "sum"}
    for dtypes in ((BFLOAT16,) * 2, (FLOAT64,) * 2):
        base, tuned = group((8, 40), [dtypes[0], *[dtypes[1]] * 8], random)
        for kind, elect in variants.items():
            rules = rules_for(base, tuned, elect, kind)
            options = {"elect": elect, "normalize": elect != "none", "sparsifiers": rules, "out_dtype": dtypes[0]}
            yield Case(f"{kind} of models in {dtypes[0]}", (base, tuned, WEIGHTS), options, compiled=True)
        base, tuned = group((8, 40), [dtypes[0]] * 21, random)
        options = {"elect": "sum", "normalize": True, "sparsifiers": sparsifiers(base, tuned, "ties")}
        yield Case(f"ties of 20 models in {dtypes[0]}", (base, tuned, 0.05), options, compiled=True)
    for first, second in ((FLOAT16, FLOAT16), (FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT32, BFLOAT16)):
        base, tuned = group((9, 31), [first, *[second, first] * 4], random)
        options = {"elect": "count", "normalize": True, "out_dtype": FLOAT16 if first == FLOAT16 else None}
        yield Case(f"mean of models, {second} and {first}", (base, tuned, WEIGHTS), options, compiled=True)
