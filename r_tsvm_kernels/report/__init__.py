"""Texts about a merge for people: the summary of its report, its page, and the model card."""

from .card import inherited_terms, model_card, short_name
from .page import page_part, policy_hash, report_page
from .summaries import plain, summary, time_per_stage

__all__ = [
    "inherited_terms",
    "model_card",
    "page_part",
    "plain",
    "policy_hash",
    "report_page",
    "short_name",
    "summary",
    "time_per_stage",
]
