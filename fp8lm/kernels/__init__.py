"""Raw tensors in, raw tensors out: the arithmetic on low-precision payloads, per device."""

from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.kernels.select import select_kernels

__all__ = ["ReferenceKernels", "select_kernels"]
