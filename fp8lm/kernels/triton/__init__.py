"""Fused kernels in Triton, for NVIDIA GPUs with FP8 tensor cores.

Only `fp8lm.kernels.select` and tests import the modules of this package: Triton is not needed, and
on many machines not there, where another backend runs.
"""
