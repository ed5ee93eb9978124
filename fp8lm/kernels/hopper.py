"""FP8 GEMMs on tensor cores (sm_89 and newer) through cuBLASLt.

Hopper's FP8 tensor cores read both operands with the contraction dimension contiguous, so
operands that arrive transposed (dgrad's weight, wgrad's activations and gradients) are copied
first. Casts and decodes are the reference's, which run on the GPU as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lm.kernels.reference import ReferenceKernels, causal_attention, check_gemm_operands
from fp8lm.numerics import Format


class HopperKernels(ReferenceKernels):
    """Reference kernels with the GEMM replaced by `torch._scaled_mm` (cuBLASLt)."""

    block_elements = 1 << 62  # a GPU takes a tensor of any size in one launch
    # Launches are few already; an fp32 copy of a block takes 32 MiB.
    step_elements = 1 << 23
    gemm_by = "FP8 tensor cores through torch._scaled_mm (cuBLASLt)"
    attention_by = "scaled_dot_product_attention in BF16"
    elementwise_by = "eager PyTorch"

    def gemm(
        self,
        a: tuple[Tensor, Tensor, Format],
        b: tuple[Tensor, Tensor, Format],
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        fast_accumulation: bool = False,
    ) -> Tensor:
        """See `ReferenceKernels.gemm`; unscaled formats take the ordinary matrix product."""
        (a_payload, a_scale, a_format), (b_payload, b_scale, b_format) = a, b
        if not (a_format.storage == b_format.storage == torch.uint8):
            return super().gemm(a, b, out_dtype=out_dtype)
        check_gemm_operands(a, b)
        return torch._scaled_mm(
            a_payload.contiguous().view(a_format.dtype),
            b_payload.contiguous().view(b_format.dtype).t(),
            scale_a=a_scale.reciprocal(),
            scale_b=b_scale.reciprocal(),
            out_dtype=out_dtype,
            use_fast_accum=fast_accumulation,
        )

    def attention(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float) -> Tensor:
        """Causal attention in the dtype given (flash attention in bf16)."""
        return causal_attention(q_BNSD, k_BGSD, v_BGSD, dropout)
