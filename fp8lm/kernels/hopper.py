"""A GPU without Triton: FP8 GEMMs through cuBLASLt, all other operations are the reference's.

Hopper's FP8 tensor cores read both operands with the contraction dimension contiguous: `transpose`
copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fp8lm.batch import Documents
from fp8lm.kernels import cublaslt
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.attention import DocumentMask, FusedAttention, attention_at_positions
from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, GEMM
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.numerics import BF16, PER_TENSOR, Format, Granularity
from fp8lm.scaled_tensor import ScaledTensor


class HopperKernels:
    """`Kernels` in eager PyTorch with the GEMM of cuBLASLt; see the module."""

    def __init__(self, attention: FusedAttention | None = None) -> None:
        self._attention = attention or FusedAttention()
        # A GPU takes a tensor of any size in one launch. The blocks of an optimizer step are few
        # launches already, and an fp32 copy of one takes 32 MiB.
        self._eager = ReferenceKernels(block_elements=1 << 62, step_elements=1 << 23)

    @property
    def backends(self) -> Mapping[str, str]:
        """See `Kernels`."""
        return MappingProxyType(
            {
                GEMM: cublaslt.DESCRIPTION,
                ATTENTION: self._attention.description,
                ELEMENTWISE: "eager PyTorch",
            }
        )

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        fast_accumulation: bool = False,
    ) -> Tensor:
        """See `Kernels`; formats other than FP8 take the ordinary matrix product."""
        if bias is not None and a.format == b.format == BF16 and out_dtype == torch.bfloat16:
            return cublaslt.bf16_gemm(a, b, bias)
        if not (a.format.storage == b.format.storage == torch.uint8):
            return self._eager.gemm(a, b, bias=bias, out_dtype=out_dtype)
        return cublaslt.gemm(a, b, bias, out_dtype, fast_accumulation)

    def copies_transposed(self, fmt: Format) -> bool:
        """See `Kernels`."""
        return fmt.storage == torch.uint8

    def transpose(self, x: ScaledTensor) -> ScaledTensor:
        """See `Kernels`: a copy of FP8 payloads; other GEMMs read a view as well."""
        view = x.t()
        if not self.copies_transposed(x.format):
            return view
        payload = view.payload.contiguous()
        return ScaledTensor(payload, view.scale, x.format, view.granularity, view.inverse)

    def document_mask(self, documents: Documents, dtype: torch.dtype) -> DocumentMask:
        """See `Kernels`."""
        return self._attention.document_mask(documents, dtype)

    def attention(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        dropout: float,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """See `Kernels`."""
        return self._attention(q_BNSD, k_BGSD, v_BGSD, dropout, mask)

    def attention_at(
        self, q_BNSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, positions_BS: Tensor
    ) -> Tensor:
        """See `Kernels` (in bf16)."""
        return attention_at_positions(q_BNSD, k_BGCD, v_BGCD, positions_BS)

    # Operations without a faster kernel yet: the reference.

    def amax(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.amax(x)

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """See `Kernels`."""
        return self._eager.cast(x, scale, fmt, saturate=saturate)

    def quantize(
        self,
        x: Tensor,
        fmt: Format,
        *,
        amax: Tensor | None = None,
        granularity: Granularity = PER_TENSOR,
    ) -> ScaledTensor:
        """See `Kernels`."""
        return self._eager.quantize(x, fmt, amax=amax, granularity=granularity)

    def quantize_with_transpose(
        self, x: Tensor, fmt: Format, *, amax: Tensor | None = None, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """See `Kernels`."""
        quantized = self.quantize(x, fmt, amax=amax)
        return quantized, self.transpose(quantized)

    def column_sums(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.column_sums(x)

    def quantize_into(self, sources: Sequence[Tensor], targets: Sequence[ScaledTensor]) -> None:
        """See `Kernels`."""
        self._eager.quantize_into(sources, targets)

    def dequantize(self, x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Kernels`."""
        return self._eager.dequantize(x, dtype)

    def join(self, parts: Sequence[ScaledTensor], dtype: torch.dtype) -> Tensor:
        """See `Kernels`."""
        return self._eager.join(parts, dtype)

    def accumulate_(self, total: ScaledTensor, x: Tensor) -> None:
        """See `Kernels`."""
        self._eager.accumulate_(total, x)

    def add_rows_(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """See `Kernels`: PyTorch sorts the rows, where its `index_add_` adds by atomics."""
        total.index_put_((rows,), values.float(), accumulate=True)

    def square_sums_and_amaxes(self, tensors: Sequence[ScaledTensor]) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        return self._eager.square_sums_and_amaxes(tensors)

    def sum_in_order(
        self, terms: Sequence[ScaledTensor | Tensor], dtype: torch.dtype, *, divisor: int = 1
    ) -> Tensor:
        """See `Kernels`."""
        return self._eager.sum_in_order(terms, dtype, divisor=divisor)

    def add_in_format(self, a: ScaledTensor, b: ScaledTensor) -> ScaledTensor:
        """See `Kernels`."""
        return self._eager.add_in_format(a, b)

    def saturated_share(self, x: ScaledTensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.saturated_share(x)

    def adam(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> Tensor:
        """See `Kernels`."""
        return self._eager.adam(params, table, coefficients)

    def rope(
        self, qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels`."""
        return self._eager.rope(qkv_SBGHD, cos, sin, queries)

    def rope_backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        queries: slice,
        heads_per_group: int,
    ) -> Tensor:
        """See `Kernels`."""
        return self._eager.rope_backward(gradients, cos, sin, queries, heads_per_group)

    def cross_entropy(
        self,
        logits_TV: Tensor,
        columns_T: Tensor,
        used: int,
        gather: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Kernels`."""
        return self._eager.cross_entropy(logits_TV, columns_T, used, gather)

    def cross_entropy_backward(self, saved: tuple[Tensor, ...], dy_T: Tensor, used: int) -> Tensor:
        """See `Kernels`."""
        return self._eager.cross_entropy_backward(saved, dy_T, used)

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Kernels`."""
        return self._eager.norm(x, weight, bias, eps)

    def norm_backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        statistics: tuple[Tensor, ...],
        dy: Tensor,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See `Kernels`."""
        return self._eager.norm_backward(x, weight, bias, statistics, dy, eps, residual)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return self._eager.gelu(x, approximate)

    def gelu_backward(self, x: Tensor, dy: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return self._eager.gelu_backward(x, dy, approximate)

    def swiglu(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.swiglu(x)

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.swiglu_backward(x, dy)
