"""Kernels that note the GEMMs they are asked for."""

from __future__ import annotations

from fp8lm.kernels import ReferenceKernels


class RecordingKernels(ReferenceKernels):
    """`gemms`: (format of a, format of b, fast_accumulation) of every GEMM, in order."""

    def __init__(self):
        self.gemms = []

    def gemm(self, a, b, **options):
        self.gemms.append((a[2], b[2], options.get("fast_accumulation", False)))
        return super().gemm(a, b, **options)
