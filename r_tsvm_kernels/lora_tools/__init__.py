"""Extract adapters from fine-tunes, cut them to a smaller rank, merge them."""

from .extract import extract_lora
from .merge import merge_lora
from .output import AdapterResult, LeftOut, ModuleReport
from .parts import parts_to_lora
from .resize import resize_lora

__all__ = ["AdapterResult", "LeftOut", "ModuleReport", "extract_lora", "merge_lora", "parts_to_lora", "resize_lora"]
