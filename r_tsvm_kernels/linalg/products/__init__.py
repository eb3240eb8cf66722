"""Solver ``products``: TSV-Merge and weighted merges from matrix products alone, for tensor cores.

`subspaces` finds each task's singular subspaces by `purification` of its Gram matrix, and estimates their error from
its traces (`near_cut`). `merge` puts the bases of all tasks side by side, orthogonalises them by `polar_express`,
estimates the error of that (`turning`), and multiplies. `weighted` merges by weighted orthogonalisation: its polar
factors come from Gram matrices, in stages (`gram_polar`), and their errors are measured (`polar_accuracy`,
`weighted_accuracy`). `number_formats` holds the formats of the products; `cuda_graph` launches the loops of small
kernels as CUDA graphs.
"""
