"""Comparisons with mergekit, FusionBench and PEFT, each in an environment of its own."""
