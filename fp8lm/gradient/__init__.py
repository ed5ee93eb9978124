"""Gradients in low precision: accumulation over micro-batches, and their reduction."""

from fp8lm.gradient.accumulator import GradientAccumulator

__all__ = ["GradientAccumulator"]
