"""Benchmarks that check a result before they time it; `rtsvm bench` runs them."""

from . import element_wise, merges, spectral
from .case import Case, Inputs, Provider
from .comparison import Change, compare, compare_turns, different_circumstances, read_report
from .measure import Stopwatch, interleaved, leaves, peak_extra_bytes, worst_error
from .record import ResultFile, provenance, quartiles, ratios
from .registry import REGISTRY, Benchmark, chosen
from .shapes import MODELS, matrix
from .suite import PLANS, Plan, run_case, run_suite

__all__ = [
    "MODELS",
    "PLANS",
    "REGISTRY",
    "Benchmark",
    "Case",
    "Change",
    "Inputs",
    "Plan",
    "Provider",
    "ResultFile",
    "Stopwatch",
    "chosen",
    "compare",
    "compare_turns",
    "different_circumstances",
    "element_wise",
    "interleaved",
    "leaves",
    "matrix",
    "merges",
    "peak_extra_bytes",
    "provenance",
    "quartiles",
    "ratios",
    "read_report",
    "run_case",
    "run_suite",
    "spectral",
    "worst_error",
]
