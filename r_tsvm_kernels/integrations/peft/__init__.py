"""Combine LoRA adapters as PEFT does, without forming dense matrices unless they are needed.

`combine_adapters` takes state dicts and needs neither PEFT nor a model. `install` makes PEFT's
``model.add_weighted_adapter`` use our kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..installation import Installation
from .state_dicts import COMBINATION_TYPES, combine_adapters

if TYPE_CHECKING:
    from ..installation import Replacements

__all__ = ["COMBINATION_TYPES", "INSTALLATION", "calls", "combine_adapters", "install", "uninstall"]


def _patch() -> Replacements:
    from .patch import patch

    return patch()


INSTALLATION = Installation("peft", ["0.21.2"], _patch)


def install() -> None:
    """Make ``LoraModel.add_weighted_adapter`` use our kernels, for the combination types that end in ``svd``.

    Arguments stay PEFT's, and results agree with PEFT's up to rounding: ``svd`` takes thin QRs and a small core, the
    others our pruning and election and a truncated SVD. Three things differ: of equal magnitudes the first are kept;
    random masks follow torch's seed but differ from PEFT's; and adapters in half precision are combined without
    rounding to it. We handle linear layers, embeddings and 2-D convolutions without groups. PEFT itself handles
    quantised and tensor-parallel layers, and factors that are clamped or not finite.

    For every combination type, ``add_weighted_adapter`` then corrects two errors of PEFT 0.21.2: combined rsLoRA
    adapters get the scaling 1, which their factors are made for; and the result takes over a module that one adapter
    has in `modules_to_save`. It also refuses, before it changes the model, adapters that are more than products of
    factors (DoRA, `lora_bias`, PiSSA, ...) with `AdapterRefusedError`, and a wrong number of weights with
    `ConfigError`. PEFT silently combines a part of them.

    Warns once if the version of PEFT was never tested.

    Raises:
        IntegrationError: PEFT is not installed, too old, or not built as expected.
    """
    INSTALLATION.install()


def uninstall() -> None:
    """Undo `install`. Does nothing if nothing is installed."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many layers were combined by each type in this process, and how many PEFT combined itself."""
    return INSTALLATION.calls()
