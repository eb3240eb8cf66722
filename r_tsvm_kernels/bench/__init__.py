"""Benchmarks that check a result before they time it; `rtsvm bench` runs them."""

from . import element_wise, merges, spectral
from .case import Case, Inputs, Provider
from .comparison import Change, compare, different_circumstances
from .measure import Stopwatch, interleaved, leaves, peak_extra_bytes, peak_of, worst_error
from .registry import REGISTRY, Benchmark, chosen
from .results import Results, Row, exponent, quartiles, ratios, read_rows, row, source_hash, write_rows
from .shapes import MODELS, matrix
from .suite import DECAYING, PLANS, Plan, run_case, run_suite

__all__ = [
    "DECAYING",
    "MODELS",
    "PLANS",
    "REGISTRY",
    "Benchmark",
    "Case",
    "Change",
    "Inputs",
    "Plan",
    "Provider",
    "Results",
    "Row",
    "Stopwatch",
    "chosen",
    "compare",
    "different_circumstances",
    "element_wise",
    "exponent",
    "interleaved",
    "leaves",
    "matrix",
    "merges",
    "peak_extra_bytes",
    "peak_of",
    "quartiles",
    "ratios",
    "read_rows",
    "row",
    "run_case",
    "run_suite",
    "source_hash",
    "spectral",
    "worst_error",
    "write_rows",
]
