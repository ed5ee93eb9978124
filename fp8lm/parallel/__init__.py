"""Tensor and sequence parallelism: what layers exchange, in FP8 bytes with their scales."""

from fp8lm.parallel.tensor import TensorParallel

__all__ = ["TensorParallel"]
