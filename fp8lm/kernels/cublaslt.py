"""The FP8 GEMM of tensor cores (sm_89 and newer), cuBLASLt's through `torch._scaled_mm`."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.kernels.reference import check_gemm_operands
from fp8lm.scaled_tensor import ScaledTensor

DESCRIPTION = "FP8 tensor cores through torch._scaled_mm (cuBLASLt)"


def scaled_mm(
    a: ScaledTensor,
    b: ScaledTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    """`Kernels.gemm` of FP8 operands.

    Hopper's FP8 tensor cores read both with the contraction dimension contiguous: ValueError for
    others, instead of a silent copy, and for scales of another granularity than per tensor.
    """
    check_gemm_operands(a, b)
    for operand in (a, b):
        if not operand.payload.is_contiguous():
            raise ValueError(f"the contraction of {operand} is not contiguous: transpose it")
        if not operand.granularity.is_per_tensor:
            raise ValueError(f"cuBLASLt is not asked for scales {operand.granularity}")
    return torch._scaled_mm(  # noqa: SLF001 (torch has no public one)
        a.fp8,
        b.fp8.t(),
        scale_a=a.inverse_scale(),
        scale_b=b.inverse_scale(),
        bias=bias,
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulation,
    )
