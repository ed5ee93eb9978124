"""`TritonKernels`: the operations of a training step in one or two launches each.

Where eager PyTorch has one launch as well (a change of dtype, an fp32 sum), and for granularities
that no part of a training step has, it is the reference that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from fp8lm.batch import Documents
from fp8lm.kernels import cublaslt
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.attention import DocumentMask, FusedAttention, attention_at_positions
from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, GEMM
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.kernels.triton import (
    accumulate,
    cast,
    cross_entropy,
    gelu,
    messages,
    norm,
    rope,
    rows,
    sums,
    swiglu,
    transpose,
    wide_norm,
)
from fp8lm.kernels.triton.adam import MultiTensorAdam
from fp8lm.kernels.triton.amax import partial_amaxes
from fp8lm.kernels.triton.column_sums import add_over_programs
from fp8lm.kernels.triton.memo import Memo
from fp8lm.kernels.triton.reductions import MultiTensorNorm
from fp8lm.numerics import (
    BF16,
    E2M5,
    E4M3,
    E5M2,
    FP16,
    FP32,
    PER_TENSOR,
    Format,
    Granularity,
)
from fp8lm.scaled_tensor import ScaledTensor

# Formats that kernels encode and decode, with scales that they find; others have no scale, or are
# of the optimizer alone.
_SCALED = (E4M3, E5M2, E2M5, FP16)


class TritonKernels:
    """`Kernels` for a GPU with FP8 tensor cores; the results are the reference's, bit for bit.

    Exceptions: GEMMs and attention (cuBLASLt's and PyTorch's), the order of fp64 sums, the sign of
    an FP8 NaN, values below 2^-133, which the reference decodes to zero, Adam's root, which PyTorch
    does not always round correctly on a CPU, exponentials with their sums (cross-entropy, SwiGLU,
    GELU), and the sums of norms. Kernels that make a tensor that is cast next find its amax.
    """

    def __init__(self, attention: FusedAttention | None = None) -> None:
        self._attention = attention or FusedAttention()
        # A GPU takes a tensor of any size in one launch; an fp32 copy of a block of what the
        # reference works on in steps takes 32 MiB.
        self._eager = ReferenceKernels(block_elements=1 << 62, step_elements=1 << 23)
        self._adam = MultiTensorAdam()
        self._norm = MultiTensorNorm()
        self._known_amaxes = Memo(length=4)
        self._known_sums = Memo(length=1)
        self._ones: dict[torch.device, Tensor] = {}

    @property
    def backends(self) -> Mapping[str, str]:
        """See `Kernels`."""
        return MappingProxyType(
            {
                GEMM: cublaslt.DESCRIPTION,
                ATTENTION: self._attention.description,
                ELEMENTWISE: "fused Triton kernels",
            }
        )

    def amax(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._amaxes(x, None).amax().view(torch.float32)

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """See `Kernels`; always saturates."""
        if fmt in _SCALED and scale.ndim == 0:
            return cast.cast(x, scale, fmt)
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
        if fmt in _SCALED and granularity.is_per_tensor:
            return cast.quantize(x, fmt, self._amaxes(x, amax))
        if fmt in _SCALED and (length := rows.row_length(x.shape, granularity)):
            return rows.quantize_rows(x, fmt, amax, granularity, length)
        if not fmt.scaled:
            return ScaledTensor(x.to(fmt.dtype), self._one(x.device), fmt)
        return self._eager.quantize(x, fmt, amax=amax, granularity=granularity)

    def quantize_with_transpose(
        self, x: Tensor, fmt: Format, *, amax: Tensor | None = None, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """See `Kernels`."""
        if fmt in _SCALED and self.copies_transposed(fmt):
            amaxes = self._amaxes(x, amax)
            quantized, transposed, partial_sums = cast.quantize_with_transpose(
                x, fmt, amaxes, sums=sums
            )
            if partial_sums is not None:
                self._known_sums.remember(x, partial_sums)
            return quantized, transposed
        quantized = self.quantize(x, fmt, amax=amax)
        return quantized, self.transpose(quantized)

    def quantize_into(self, sources: Sequence[Tensor], targets: Sequence[ScaledTensor]) -> None:
        """See `Kernels`."""
        spacing, made = messages.Spacing.of(sources), messages.Messages.of(targets)
        one_scale = targets[0].granularity.is_per_tensor and _is_known(targets[0].format)
        if spacing is not None and made is not None and one_scale:
            messages.quantize_chunks(sources, spacing, made)
            return
        for x, target in zip(sources, targets, strict=True):
            length = rows.row_length(x.shape, target.granularity)
            if length and target.format in _SCALED and _is_contiguous(target):
                rows.quantize_rows_into(x, target, None, length)
            else:
                self._eager.quantize_into([x], [target])

    def column_sums(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        sums = self._known_sums.recall(x)
        if sums is None:
            return self._eager.column_sums(x)
        return add_over_programs(sums[None], x.dtype)[0]

    def dequantize(self, x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Kernels`."""
        if x.format not in _SCALED:
            return self._eager.dequantize(x, dtype)
        if not x.granularity.is_per_tensor:
            length = rows.row_length(x.shape, x.granularity)
            if length and _is_contiguous(x):
                return rows.dequantize_rows(x, dtype, length)
            return self._eager.dequantize(x, dtype)
        if x.format == E2M5:  # a scale that is no power of two, for which bf16 is not exact
            return self._eager.dequantize(x, dtype)
        if x.payload.ndim == 2 and x.payload.t().is_contiguous():
            return cast.dequantize(x.t(), dtype).t()
        return cast.dequantize(_contiguous(x), dtype)

    def join(self, parts: Sequence[ScaledTensor], dtype: torch.dtype) -> Tensor:
        """See `Kernels`."""
        joined = messages.Messages.of(parts)
        if joined is not None and _is_plain(parts[0]):
            return messages.join(joined, dtype)
        return self._eager.join(parts, dtype)

    def copies_transposed(self, fmt: Format) -> bool:
        """See `Kernels`."""
        return fmt.storage == torch.uint8

    def transpose(self, x: ScaledTensor) -> ScaledTensor:
        """See `Kernels`: a copy of FP8 payloads; other GEMMs read a view as well."""
        view = x.t()
        if not self.copies_transposed(x.format) or view.payload.is_contiguous():
            return view
        payload = transpose.transpose(x.payload)
        return ScaledTensor(payload, view.scale, x.format, view.granularity, view.inverse)

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
        if a.format.storage == b.format.storage == torch.uint8:
            return cublaslt.gemm(a, b, bias, out_dtype, fast_accumulation)
        if bias is not None and a.format == b.format == BF16 and out_dtype == torch.bfloat16:
            return cublaslt.bf16_gemm(a, b, bias)
        return self._eager.gemm(a, b, bias=bias, out_dtype=out_dtype)

    def accumulate_(self, total: ScaledTensor, x: Tensor) -> None:
        """See `Kernels`."""
        if total.format in (BF16, FP32):  # PyTorch adds in fp32 and rounds once
            torch.add(total.payload, x, out=total.payload)
        elif total.format in (E4M3, E5M2) and total.granularity.is_per_tensor:
            accumulate.accumulate_per_tensor(total, x)
        elif (
            total.format in _SCALED
            and rows.row_length(total.shape, total.granularity) == total.shape[-1]
        ):
            accumulate.accumulate_per_row(total, x)
        else:
            self._eager.accumulate_(total, x)

    def add_rows_(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """See `Kernels`: PyTorch sorts the rows, where its `index_add_` adds by atomics."""
        total.index_put_((rows,), values.float(), accumulate=True)

    def square_sums_and_amaxes(self, tensors: Sequence[ScaledTensor]) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        return self._norm.square_sums_and_amaxes(tensors)

    def sum_in_order(
        self, terms: Sequence[ScaledTensor | Tensor], dtype: torch.dtype, *, divisor: int = 1
    ) -> Tensor:
        """See `Kernels`."""
        added = sums.Terms.of(terms)
        if added is not None:
            return sums.sum_in_order(added, dtype, divisor)
        return self._eager.sum_in_order(terms, dtype, divisor=divisor)

    def add_in_format(self, a: ScaledTensor, b: ScaledTensor) -> ScaledTensor:
        """See `Kernels`."""
        if a.format == b.format and _is_plain(a) and _is_plain(b):
            return sums.add_in_format(a, b)
        return self._eager.add_in_format(a, b)

    def saturated_share(self, x: ScaledTensor) -> Tensor:
        """See `Kernels`."""
        return self._eager.saturated_share(x)

    def adam(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> Tensor:
        """See `Kernels`."""
        return self._adam.step(params, table, coefficients)

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

    def rope(
        self, qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels`."""
        return rope.split_and_rotate(qkv_SBGHD, cos, sin, queries)

    def rope_backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        queries: slice,
        heads_per_group: int,
    ) -> Tensor:
        """See `Kernels`."""
        joined = rope.rotate_back_and_join(gradients, cos, sin, queries, heads_per_group)
        return self._known_amaxes.remember(*joined)

    def cross_entropy(
        self,
        logits_TV: Tensor,
        columns_T: Tensor,
        used: int,
        gather: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Kernels`."""
        return cross_entropy.cross_entropy(logits_TV, columns_T, used, gather)

    def cross_entropy_backward(self, saved: tuple[Tensor, ...], dy_T: Tensor, used: int) -> Tensor:
        """See `Kernels`."""
        return cross_entropy.cross_entropy_backward(saved, dy_T, used)

    def swiglu(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._known_amaxes.remember(*swiglu.swiglu(x))

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._known_amaxes.remember(*swiglu.swiglu_backward(x, dy))

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return self._known_amaxes.remember(*gelu.gelu(x, approximate))

    def gelu_backward(self, x: Tensor, dy: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return self._known_amaxes.remember(*gelu.gelu_backward(x, dy, approximate))

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Kernels`."""
        y, statistics, amaxes = _norms_of(x).norm(x, weight, bias, eps)
        return self._known_amaxes.remember(y, amaxes), statistics

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
        gradients, amaxes = _norms_of(x).norm_backward(x, weight, bias, statistics, dy, residual)
        self._known_amaxes.remember(gradients[0], amaxes)
        return gradients

    def _one(self, device: torch.device) -> Tensor:
        """The scale of formats without one, made once."""
        if device not in self._ones:
            self._ones[device] = torch.ones((), device=device)
        return self._ones[device]

    def _amaxes(self, x: Tensor, amax: Tensor | None) -> Tensor:
        """Bits of the amax that is given, or maxima of parts of `x`."""
        if amax is not None:
            return amax.view(torch.int32).view(1)
        known = self._known_amaxes.recall(x)
        return partial_amaxes(x) if known is None else known


def _norms_of(x: Tensor) -> ModuleType:
    """The kernels for rows of such length."""
    return norm if x.shape[-1] <= norm.MAX_COLUMNS else wide_norm


def _is_known(fmt: Format) -> bool:
    """Whether kernels decode it."""
    return fmt in _SCALED or not fmt.scaled


def _is_plain(x: ScaledTensor) -> bool:
    """Contiguous, of a known format, with one scale that is a power of two."""
    return (
        _is_known(x.format)
        and x.granularity.is_per_tensor
        and x.format != E2M5
        and x.payload.is_contiguous()
    )


def _is_contiguous(x: ScaledTensor) -> bool:
    return x.payload.is_contiguous() and x.scale.is_contiguous()


def _contiguous(x: ScaledTensor) -> ScaledTensor:
    return ScaledTensor(x.payload.contiguous(), x.scale, x.format)
