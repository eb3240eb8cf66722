"""Code that KnOTS and Core Space share: another method merges small matrices in a common basis."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from ..linalg import Mode
from ..linalg.decompositions import frobenius_norm
from .base import FiniteFloat, MethodParameters, PerModel, get_method
from .recall import keeping
from .reports import MergeResult
from .sparsify import Share, tensor_seed


class CommonBasisParameters(MethodParameters):
    """Parameters of methods that merge in a common basis."""

    density: PerModel[Share] = Field(
        default=(1.0,), description="for ties and dare: fraction of each part that is kept"
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="of the random masks of dare")
    alpha: FiniteFloat = Field(default=1.0, alias="scaling_coeffs", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )

    def for_tensor(self, name: str) -> MethodParameters:
        """Give the tensor its own seed, so that masks depend neither on the order of tensors nor on threads."""
        return self.model_copy(update={"seed": tensor_seed(self.seed, name)}) if name else self


def part_norms(parts: Sequence[Tensor], method: str, options: CommonBasisParameters) -> list[float]:
    """Return the norms of the weighted parts as `merge_parts` sums them: methods that average divide by the weights."""
    weights = [abs(weight) for weight in options.weight]
    total = abs(sum(options.weight))
    if method in ("linear", "ties") and total:
        # The disjoint mean keeps an element whole that only one task has, or elects.
        most = [sum(weights)] * len(weights) if method == "ties" else weights
        weights = [weight / total for weight in most]
    return [weight * frobenius_norm(part) for weight, part in zip(weights, parts, strict=True)]


def merge_parts(parts: Sequence[Tensor], method: str, options: CommonBasisParameters) -> MergeResult:
    """Merge the parts of all tasks by a registered method, as task vectors with a base of zeros."""
    inner = get_method(method)
    shared = inner.parameters.model_fields.keys() & {"weight", "density", "seed", "mode"}
    parameters = inner.parameters(**{name: getattr(options, name) for name in sorted(shared)})
    with keeping(None):  # thresholds of parts, which depend on more than the models, are not those of task vectors
        return inner.run(parts[0].new_zeros(parts[0].shape), parts, parameters)
