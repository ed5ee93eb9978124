"""Gradients in low precision: accumulation over micro-batches, and their reduction."""

from fp8lm.gradient.main_grad import MainGrad

__all__ = ["MainGrad"]
