"""Plan a merge of checkpoints from headers alone: inputs, treatment of each tensor, memory and operations."""

from .batching import batches
from .costs import Footprint, footprint, matrix_cost, rows_at_a_time, tensor_cost, total_flops
from .decomposition import Decomposition, tasks_of
from .inputs import Inputs, open_inputs
from .merge_plan import InputFile, MergePlan, Part, TensorPlan
from .parameters import common_parameters, model_parameters, varying_parameters
from .planning import make_plan
from .vocabulary import AlignedVocabulary, TokenGroup

__all__ = [
    "AlignedVocabulary",
    "Decomposition",
    "Footprint",
    "InputFile",
    "Inputs",
    "MergePlan",
    "Part",
    "TensorPlan",
    "TokenGroup",
    "batches",
    "common_parameters",
    "footprint",
    "make_plan",
    "matrix_cost",
    "model_parameters",
    "open_inputs",
    "rows_at_a_time",
    "tasks_of",
    "tensor_cost",
    "total_flops",
    "varying_parameters",
]
