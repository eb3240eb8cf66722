"""LoRA adapters combined as PEFT does, without the dense matrices where there need be none.

`combine_adapters` takes state dicts and needs neither PEFT nor a model. `install` puts ``model.add_weighted_adapter``
of PEFT on our kernels.
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
    """Put ``LoraModel.add_weighted_adapter`` on our kernels, for the combination types that end in ``svd``.

    Arguments and results are PEFT's, to rounding: ``svd`` from thin QRs and a small core, the others with our pruning
    and election and a truncated SVD. The first of equal magnitudes are kept, random masks follow torch's seed but are
    other draws than PEFT's, and adapters in half precision are combined without being rounded to it. Linear layers,
    embeddings and 2-D convolutions without groups are ours; quantised and tensor-parallel layers, factors that are
    clamped or not finite are left to PEFT.

    For every combination type, ours and PEFT's own, ``add_weighted_adapter`` gets right what PEFT 0.21.2 gets wrong:
    combined rsLoRA adapters have the scaling 1 that their factors are made for, and a module that one adapter has in
    `modules_to_save` is that of the result. Adapters that are more than products of factors (DoRA, `lora_bias`, PiSSA,
    ...) it refuses with `AdapterRefusedError`, and another number of weights than adapters with `ConfigError`, before
    the model is changed; PEFT combines a part of them.

    Warns once if the version of PEFT was never tested.

    Raises:
        IntegrationError: PEFT is not installed, too old, or not built as expected.
    """
    INSTALLATION.install()


def uninstall() -> None:
    """Restore PEFT as it was. Without an installation nothing happens."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many layers were combined by each type in this process, and how many were left to PEFT."""
    return INSTALLATION.calls()
