"""Parts: the summands of a merge that is linear in the weights, one file for each task, and merges from them."""

from .folder import PARTS_FILE, PartsFolder, Task, TensorParts, content_of, is_parts
from .merging import merge_parts
from .recipe import check_recipe, from_parts, linear_parameters, require_linear
from .storing import LEFT, RIGHT, StoredParts, store_parts

__all__ = [
    "LEFT",
    "PARTS_FILE",
    "RIGHT",
    "PartsFolder",
    "StoredParts",
    "Task",
    "TensorParts",
    "check_recipe",
    "content_of",
    "from_parts",
    "is_parts",
    "linear_parameters",
    "merge_parts",
    "require_linear",
    "store_parts",
]
