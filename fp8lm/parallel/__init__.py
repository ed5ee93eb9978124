"""Data, tensor, sequence and pipeline parallelism; communication is FP8 bytes with their scales."""

from fp8lm.parallel.tensor_parallel import TensorParallel

__all__ = ["TensorParallel"]
