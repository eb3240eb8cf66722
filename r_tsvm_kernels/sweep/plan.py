"""The plan of a sweep: how many candidates, which of them share parts, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import MergeConfig
from ..engine.steps import with_base_as_step
from ..errors import ConfigError
from ..parts import linear_parameters
from ..plan import Decomposition, MergePlan, make_plan, total_flops
from ..plan.decomposition import decomposed
from ..sizes import parse_size
from .axes import Axis, check_axes, check_divided, grid_axis, range_axis
from .candidates import Candidate, free_axes, grid_candidates
from .merger import Resources
from .search import check_search
from .updates import can_share, size_of_update

Grids = Mapping[str, str | Sequence[Any]]
Ranges = Mapping[str, str | Sequence[float]]

# Plans of merges that are made to know what candidates cost; those of other groups are taken to be like them.
_MOST_PLANS = 16


@dataclass(frozen=True)
class GroupPlan:
    """Candidates that share parts, because they differ only in parameters that these leave free; others are alone.

    Attributes:
        values: what they have in common, by label.
        candidates: their number.
        from_parts: whether they share parts: those of a decomposition, or the update of one merge.
        flops: operations of one merge from the models, or of making the parts.
        bytes_read: bytes that this reads.
        bytes_of_parts: size of the parts; 0 if there are none.
        bytes_per_candidate: bytes that each merge reads: the models, or the base and the parts.
        known: whether these numbers are of the group itself, and not of one that was planned instead.
    """

    values: dict[str, Any]
    candidates: int
    from_parts: bool
    flops: float
    bytes_read: int
    bytes_of_parts: int
    bytes_per_candidate: int
    known: bool = True


@dataclass(frozen=True, repr=False)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        config: the recipe.
        axes: what is varied.
        candidates: all of them, in the order in which they are tried; empty for a search.
        shares: whether parts are used where several candidates can share them.
        total: number of candidates.
        groups: groups of candidates; empty for a search.
        free: labels of the axes in which these candidates may differ.
        merge: plan of the merge of the first candidate.
        search: ``tpe`` or ``cmaes``; None for a grid.
    """

    config: MergeConfig
    axes: tuple[Axis, ...]
    candidates: tuple[Candidate, ...]
    shares: bool
    total: int
    groups: tuple[GroupPlan, ...]
    free: tuple[str, ...]
    merge: MergePlan
    search: str | None = None

    def __repr__(self) -> str:
        axes = ", ".join(axis.label for axis in self.axes)
        return f"SweepPlan({self.total} candidates, {axes}, {self.groups_with_parts} with shared parts)"

    @property
    def groups_with_parts(self) -> int:
        """Number of groups whose candidates share parts."""
        return sum(group.from_parts for group in self.groups)

    @property
    def merged_anew(self) -> int:
        """Number of candidates that are merged from the models."""
        return sum(group.candidates for group in self.groups if not group.from_parts)

    @property
    def flops(self) -> float:
        """Operations of all merges from the models, and of making all parts; merges from parts take few."""
        return sum(group.flops * (1 if group.from_parts else group.candidates) for group in self.groups)

    @property
    def bytes_read(self) -> int:
        """Bytes that all merges read, and the making of parts."""
        return sum(
            group.bytes_per_candidate * group.candidates + (group.bytes_read if group.from_parts else 0)
            for group in self.groups
        )


def plan_sweep(
    config: MergeConfig,
    *,
    grids: Grids | None = None,
    ranges: Ranges | None = None,
    search: str | None = None,
    trials: int | None = None,
    resources: Resources | None = None,
) -> SweepPlan:
    """Plan a sweep; the arguments are those of `sweep_checkpoints`.

    Raises:
        ConfigError: the request is invalid.
        CheckpointError, ShapeError, DTypeError: the models do not match; see `merge_checkpoints`.
    """
    if steps := with_base_as_step(config).steps:
        raise ConfigError(
            f"a sweep takes a recipe of one merge, and this one has others before it: {', '.join(steps)}; make their "
            "outputs with `rtsvm merge --steps DIR` (steps=), and name these as models"
        )
    axes = _axes(config, grids or {}, ranges or {}, search, trials)
    resources = resources or Resources()
    candidates = grid_candidates(config, axes) if search is None else []
    first = candidates[0].config if candidates else config
    merge = _merge_plan(first, resources)
    free = tuple(axis.label for axis in free_axes(first, axes))
    shares = bool(free) and _size_of_parts(merge, resources.dense_above) is not None
    if not shares:
        candidates = [replace(candidate, from_parts=False) for candidate in candidates]
    groups = tuple(_groups(candidates, axes, merge, resources))
    total = len(candidates) if search is None else trials or 0
    return SweepPlan(config, tuple(axes), tuple(candidates), shares, total, groups, free, merge, search)


def _axes(config: MergeConfig, grids: Grids, ranges: Ranges, search: str | None, trials: int | None) -> list[Axis]:
    if search is None:
        for name, given in (("ranges", ranges), ("trials", trials)):
            if given:
                raise ConfigError(f"{name}: only a search has them; choose one (search='tpe'), or use grids")
        if not grids:
            raise ConfigError("nothing to vary: give a grid, such as alpha=0.4:1.6:0.2, or a search with ranges")
    elif not ranges:
        raise ConfigError("a search needs a range, such as alpha=0.2:2")
    elif trials is None or trials < 1:
        raise ConfigError(f"a search needs the number of trials, got {trials}")
    axes = [grid_axis(config, name, values) for name, values in grids.items()]
    axes += [range_axis(config, name, bounds) for name, bounds in ranges.items()]
    check_axes(axes)
    check_divided(config, axes)
    if search is not None:
        check_search(search, axes)
    return axes


def _merge_plan(config: MergeConfig, resources: Resources) -> MergePlan:
    return make_plan(config, parse_size(resources.shard_size), allow_pickle=resources.allow_pickle)


def _size_of_parts(plan: MergePlan, dense_above: int | None) -> int | None:
    """Return the bytes of what candidates share instead of this merge; None if the models do not allow it."""
    if not linear_parameters(plan.config):
        return size_of_update(plan) if can_share(plan) else None
    try:
        return decomposed(plan, Decomposition(dense_above)).bytes_written
    except ConfigError:
        return None


def _groups(
    candidates: Sequence[Candidate], axes: Sequence[Axis], first: MergePlan, resources: Resources
) -> list[GroupPlan]:
    members: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        members.setdefault(candidate.group if candidate.from_parts else str(candidate.number), []).append(candidate)
    found, plan = list[GroupPlan](), first
    for own in members.values():
        known = len(found) < _MOST_PLANS
        if known and found:
            plan = _merge_plan(own[0].config, resources)
        free = {axis.label for axis in free_axes(own[0].config, axes)} if own[0].from_parts else set()
        common = {label: value for label, value in own[0].values.items() if label not in free}
        size = _size_of_parts(plan, resources.dense_above) if own[0].from_parts else None
        base = sum(tensor.parts[0].nbytes(tensor.elements) for tensor in plan.tensors.values())
        each = plan.bytes_read if size is None else base + size
        flops = total_flops(plan)
        found.append(GroupPlan(common, len(own), own[0].from_parts, flops, plan.bytes_read, size or 0, each, known))
    return found
