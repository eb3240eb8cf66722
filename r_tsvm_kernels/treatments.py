"""What happens to a tensor in a merge, from its name, its header and the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from .blocks import WHOLE, Blocks
from .config import MergeConfig
from .errors import CheckpointError, ConfigError, DTypeError
from .experts import is_router, layout_of_experts
from .methods import MethodParameters
from .ops._checks import FLOAT_DTYPES
from .text import dtype_name, some

# Tables of older checkpoints that models compute anew when they are loaded.
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")


@dataclass(frozen=True)
class Treatment:
    """How one tensor is treated, and why.

    Attributes:
        kind: ``merge``, ``mean`` or ``base``.
        reason: why it is not merged by the method.
        excluded: whether patterns decide it.
        present_only: whether some models lack the tensor, and the mean is that of the values of the others.
    """

    kind: str
    reason: str = ""
    excluded: bool = False
    present_only: bool = False


def is_excluded(config: MergeConfig, name: str) -> bool:
    """Whether a tensor takes no part in a merge because of the patterns of the config."""
    return _matches(name, config.exclude) or bool(config.include and not _matches(name, config.include))


def is_computed(name: str) -> bool:
    """Whether a tensor is a table that models compute anew: older checkpoints store it, and no library needs it."""
    return name.endswith(_COMPUTED)


def check_same_names(
    base: Mapping[str, object], other: Mapping[str, object], label: str, config: MergeConfig
) -> list[str]:
    """Check that `other` has the tensors of `base`; return those that only `other` has.

    Excluded tensors and tables that are computed anew may be missing in either.

    Raises:
        CheckpointError: it lacks a tensor, or has one more, and ``config.missing`` is ``error``; or only one of them
            packs its experts.
    """
    beside = sorted(other.keys() - base.keys())
    needed = {name for name in base.keys() ^ other.keys() if not is_excluded(config, name) and not is_computed(name)}
    missing = sorted(needed & base.keys())
    extra = [name for name in beside if name in needed]
    layouts = layout_of_experts(missing), layout_of_experts(extra)
    if None not in layouts and layouts[0] != layouts[1]:
        raise CheckpointError(
            f"{label}: its experts are stored {layouts[1]}, those of the base {layouts[0]}; save both models with one "
            "version of one library, such as transformers: from_pretrained, then save_pretrained"
        )
    if config.missing == "error" and (missing or extra):
        kinds = {"missing": missing, "extra": extra}
        parts = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
        raise CheckpointError(
            f"{label}: its tensors are not the base's: {' and '.join(parts)}; "
            "all models must be fine-tunes of the same base, with the same layers. If they differ on purpose, "
            f"--exclude {some([repr(name) for name in missing + extra], 1)}, or choose what becomes of them with "
            "--missing base (the base's value, if it has one) or --missing mean_of_present"
        )
    return beside


def treatment(
    config: MergeConfig,
    options: MethodParameters,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tasks: int,
    blocks: Blocks = WHOLE,
) -> Treatment:
    """Decide what happens to a tensor, from its header alone; `blocks` says how it is divided.

    Raises:
        DTypeError: the tensor is of a floating-point format that cannot be merged (float8, complex).
        ConfigError: a calibration of a method whose updates have no singular directions.
    """
    if config.calibrate is not None and config.method.isotropic(options):
        raise ConfigError(
            f"calibrate: {config.method.name} makes singular values equal, so that rounding alone would choose the "
            "directions that are calibrated; leave it out, or choose another method"
        )
    if _matches(name, config.exclude):
        return Treatment("base", "excluded by pattern", excluded=True)
    if config.include and not _matches(name, config.include):
        return Treatment("base", "not among the included patterns", excluded=True)
    if not (dtype.is_floating_point or dtype.is_complex):
        return Treatment("base", f"{dtype_name(dtype)} buffer")
    if dtype not in FLOAT_DTYPES:
        advice = "exclude it, to keep the base's" if dtype.is_complex else "convert the checkpoint to bfloat16"
        raise DTypeError(f"{name or 'tensor'}: {dtype} cannot be merged; {advice}")
    if 0 in shape:
        return Treatment("base", "empty")
    if config.router != "merge" and is_router(name):
        return Treatment(config.router, "router")
    if config.method.matrices_only:
        shape = blocks.largest(shape)
        if len(shape) != 2:
            return Treatment("mean", "biases of experts" if blocks.packed else "not a matrix")
        if _matches(name, getattr(options, "exclude_keys", ())):
            return Treatment("mean", "in exclude_keys")
        if config.method.rank_per_task and min(shape) < tasks:
            if config.method.mean_if_rankless:
                return Treatment("mean", "fewer rows or columns than tasks")
            return Treatment("merge", "rank 0: fewer rows or columns than tasks, the base's value stays")
    return Treatment("merge")


def stored_dtype(config: MergeConfig, base_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a floating-point tensor of the base is stored in after the merge."""
    chosen = config.out_dtype or config.dtype
    if chosen is None or base_dtype not in FLOAT_DTYPES:
        return base_dtype
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
