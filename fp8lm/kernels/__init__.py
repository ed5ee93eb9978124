"""The arithmetic on low-precision tensors: one interface, a backend per kind of device."""

from fp8lm.kernels.interface import Kernels
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.kernels.select import select_kernels

__all__ = ["Kernels", "ReferenceKernels", "select_kernels"]
