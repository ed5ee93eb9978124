"""Kernels that note what they are asked for."""

from __future__ import annotations

from fp8lm.kernels import ReferenceKernels


class RecordingKernels(ReferenceKernels):
    """`gemms`: (format of a, format of b, fast_accumulation) of each; `attentions`: how many."""

    def __init__(self):
        super().__init__()
        self.gemms = []
        self.attentions = 0

    def gemm(self, a, b, **options):
        self.gemms.append((a.format, b.format, options.get("fast_accumulation", False)))
        return super().gemm(a, b, **options)

    def attention(self, *arguments):
        self.attentions += 1
        return super().attention(*arguments)
