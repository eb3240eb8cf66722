"""The self-check of kernels: an op's own hard cases against its reference, then times at a realistic size.

`check` runs in a process of its own, ``python -m r_tsvm_kernels.selfcheck``, which `verdicts` starts.
"""
