"""How often FusionBench came to us."""

from collections import Counter

counts: Counter[str] = Counter()
