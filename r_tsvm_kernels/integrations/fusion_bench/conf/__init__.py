"""Configurations for FusionBench's command: `method=rtsvm/rtsvm` and so on, with the defaults of our methods."""
