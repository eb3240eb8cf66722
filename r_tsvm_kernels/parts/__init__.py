"""Parts: the summands of a merge that is linear in the weights, one file for each task, and merges from them."""

from .merging import certified, merge_parts
from .recipe import check_recipe, from_parts, linear_parameters, require_linear
from .storing import StoredParts, store_parts

__all__ = [
    "StoredParts",
    "certified",
    "check_recipe",
    "from_parts",
    "linear_parameters",
    "merge_parts",
    "require_linear",
    "store_parts",
]
