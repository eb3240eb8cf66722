"""Extract adapters from fine-tunes, cut them to a smaller rank, merge them."""

from .extract import extract_lora
from .merge import merge_lora
from .output import AdapterResult, LeftOut, ModuleReport
from .resize import resize_lora

__all__ = ["AdapterResult", "LeftOut", "ModuleReport", "extract_lora", "merge_lora", "resize_lora"]
