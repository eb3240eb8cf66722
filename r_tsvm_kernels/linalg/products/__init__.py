"""Solver ``products``: TSV-Merge from matrix products alone, for tensor cores.

`subspaces` finds each task's singular subspaces by `purification` of its Gram matrix, and estimates their error from
its traces (`near_cut`). `merge` puts the bases of all tasks side by side, orthogonalises them by `polar_express`,
estimates the error of that (`turning`), and multiplies. `number_formats` holds the formats of the products;
`cuda_graph` launches the loops of small kernels as CUDA graphs.
"""
