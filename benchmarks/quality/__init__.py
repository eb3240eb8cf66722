"""The study of how good merges of small trained models are."""
