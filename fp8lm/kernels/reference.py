"""Eager PyTorch kernels: the CPU path, and the oracle of every faster kernel.

Casts, scales, decodes, transposes, accumulation, AdamW and its noise are matched bit for bit; sums
of products (GEMM, attention, norms) up to the rounding that their tests state.

    cast          payload = round_to_nearest_even(saturate(x * scale))
    dequantize    x = payload / scale                 (exact in bf16: scales are powers of two)
    gemm          D[M,N] = A[M,K] @ B[N,K]^T          fp32 accumulation, bf16 out

All finite FP8 values are exact in bf16, so on a CPU, which has no FP8 arithmetic, a bf16 GEMM of
dequantized operands *is* the FP8 GEMM up to the rounding of its output.

Scales per row or block, too. Tensor cores multiply codes, and the scales come after: those of rows
multiply the result, those of blocks along K the fp32 sum of each block before it is added to the
others (DeepSeek-V3, arXiv 2412.19437, 3.3.2). A scale is a power of two, so it commutes with every
rounding of these sums, and multiplying the codes by it first gives the same number, up to the order
of the fp32 sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from fp8lm.batch import Documents
from fp8lm.kernels import cross_entropy, rope
from fp8lm.kernels.adam import adam_step
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.attention import DocumentMask, causal_attention, masked_attention
from fp8lm.kernels.encoding import encode
from fp8lm.kernels.interface import ATTENTION, ELEMENTWISE, GEMM
from fp8lm.numerics import (
    E2M5,
    E4M3,
    E5M2,
    FP16,
    PER_TENSOR,
    ROOT_E4M4,
    Format,
    Granularity,
    scale_from_amax,
)
from fp8lm.scaled_tensor import ScaledTensor

# Bits of an FP8 code moved to where bf16 keeps its exponent and mantissa, and the power of two
# that corrects for the different exponent bias (127 - 7 and 127 - 15). Subnormals come out right
# because the correction is a multiplication: (shift, mask as a signed int16, correction).
_BF16_DECODE = {
    E4M3.name: (4, 0x87F0 - 0x10000, 2.0**120),
    ROOT_E4M4.name: (3, 0x07F8, 2.0**120),
    E5M2.name: (5, 0x8FE0 - 0x10000, 2.0**112),
    E2M5.name: (2, 0x81FC - 0x10000, 2.0**126),
}
ROWS_PER_TILE = 16


class ReferenceKernels:
    """`Kernels` in eager PyTorch; device-agnostic, no host synchronisation on a GPU.

    Large tensors are cast and dequantized in blocks of `block_elements`: the several operations of
    a cast then run in cache, and only its input and output touch memory. So does an optimizer step
    over blocks of `step_elements`, with several tensors at once.
    """

    def __init__(self, block_elements: int = 1 << 17, step_elements: int = 1 << 17) -> None:
        self.block_elements = block_elements
        self.step_elements = step_elements

    @property
    def backends(self) -> Mapping[str, str]:
        """See `Kernels`."""
        return MappingProxyType(
            {
                GEMM: "decoded operands in a BF16 GEMM: FP8's arithmetic, not its speed",
                ATTENTION: "scaled_dot_product_attention in fp32; documents apart: a mask",
                ELEMENTWISE: "eager PyTorch, in blocks that stay in cache",
            }
        )

    def amax(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        # One pass: `aminmax` propagates NaN, where `max` of `abs` may not and is 10 times slower.
        low, high = torch.aminmax(x)
        # abs() last: a maximum of zero could otherwise be -0.0, whose bits are not 0.
        return torch.maximum(-low, high).abs().float()

    def quantize(
        self,
        x: Tensor,
        fmt: Format,
        *,
        amax: Tensor | None = None,
        granularity: Granularity = PER_TENSOR,
    ) -> ScaledTensor:
        """See `Kernels`."""
        if not fmt.scaled:
            one = torch.ones((), dtype=torch.float32, device=x.device)
            return ScaledTensor(x.to(fmt.dtype), one, fmt)
        shared = amax is not None
        if granularity.is_per_tensor:
            scale = scale_from_amax(self.amax(x) if amax is None else amax, fmt)
            return ScaledTensor(self.cast(x, scale, fmt, saturate=shared), scale, fmt)
        quantized = ScaledTensor.zeros(tuple(x.shape), fmt, x.device, granularity)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        for rows, blocks in self._row_chunks(quantized):
            # fp32: a scale of its own per block takes the smallest values of bf16 below its range.
            part = x[rows].to(torch.float32, copy=True)
            largest = granularity.max(part.abs()) if amax is None else amax[blocks]
            scale = scale_from_amax(largest, fmt)
            quantized.scale[blocks] = scale
            scaled = granularity.multiply_(part, scale)
            quantized.payload[rows] = self.cast(scaled, one, fmt, saturate=shared)
        return quantized

    def quantize_with_transpose(
        self, x: Tensor, fmt: Format, *, amax: Tensor | None = None, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """See `Kernels`."""
        quantized = self.quantize(x, fmt, amax=amax)
        return quantized, self.transpose(quantized)

    def column_sums(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        return x.sum(0)

    def quantize_into(self, sources: Sequence[Tensor], targets: Sequence[ScaledTensor]) -> None:
        """See `Kernels`."""
        for x, target in zip(sources, targets, strict=True):
            if target.format.scaled:
                target.copy_(self.quantize(x, target.format, granularity=target.granularity))
            else:
                target.payload.copy_(x)

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """See `Kernels`."""
        # Clamping is explicit: torch's own FP8 cast saturates, gives NaN or gives Inf, depending on
        # format and version.
        if not fmt.scaled:
            return x.to(fmt.dtype)
        payload = torch.empty(x.shape, dtype=fmt.storage, device=x.device)
        source, target = x.reshape(-1), payload.view(fmt.dtype).view(-1)
        encoded = fmt.dtype == torch.uint8
        # bf16 would round FP16's largest number up, beyond FP16, and is short of bits for encoding.
        work_dtype = torch.float32 if fmt == FP16 or encoded else x.dtype
        for block in self._blocks(x.numel()):
            values = source[block].to(work_dtype)
            scaled = torch.mul(values.sqrt() if fmt.root else values, scale)
            if encoded:
                target[block].copy_(encode(scaled, fmt))
                continue
            if saturate:
                scaled = scaled.clamp_(-fmt.max, fmt.max)
            target[block].copy_(scaled)
        return payload

    def dequantize(self, x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Kernels`. FP8 codes are decoded by integer shifts: 8 times torch's cast on a CPU.

        NaN codes occur only together with a NaN scale (`cast` and `scale_from_amax` see to it),
        which is what makes the result NaN.
        """
        payload, fmt = x.payload, x.format
        if not fmt.scaled:
            return payload.to(dtype)
        if payload.ndim == 2 and not payload.is_contiguous() and payload.t().is_contiguous():
            return self.dequantize(x.t(), dtype).t()  # in its memory order
        payload = payload.contiguous()
        if x.granularity.is_per_tensor:
            return self.decode(payload, x.scale, fmt, dtype)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        if not fmt.power_of_two_scales:
            codes = self.decode(payload, one, fmt, torch.float32)
            return codes.div_(x.granularity.expand(x.scale, x.shape)).to(dtype)
        codes = self.decode(payload, one, fmt, dtype)  # exact: bf16 holds codes and powers of two
        return x.granularity.multiply_(codes, x.scale.reciprocal().to(dtype))

    def join(self, parts: Sequence[ScaledTensor], dtype: torch.dtype) -> Tensor:
        """See `Kernels`."""
        return torch.cat([self.dequantize(part, dtype) for part in parts])

    def copies_transposed(self, fmt: Format) -> bool:
        """See `Kernels`."""
        return False

    def transpose(self, x: ScaledTensor) -> ScaledTensor:
        """See `Kernels`: a view, which `gemm` dequantizes in its memory order."""
        return x.t()

    def decode(self, payload: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        """`dequantize` of a contiguous payload with one scale."""
        values = torch.empty(payload.shape, dtype=dtype, device=payload.device)
        source, target = payload.view(-1), values.view(-1)
        factor = scale.reciprocal()
        for block in self._blocks(payload.numel()):
            decode_block = _decode_fp16 if fmt == FP16 else _decode_fp8
            decode_block(source[block], factor, fmt, target[block])
            if fmt.root:  # exact: a number of five bits has a square of ten
                target[block].square_()
        return values

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        fast_accumulation: bool = False,
    ) -> Tensor:
        """See `Kernels`."""
        check_gemm_operands(a, b)
        dtype = torch.float32 if out_dtype == torch.float32 else torch.bfloat16
        product = torch.mm(self.dequantize(a, dtype), self.dequantize(b, dtype).t())
        return product if bias is None else product.add_(bias)

    def accumulate_(self, total: ScaledTensor, x: Tensor) -> None:
        """See `Kernels`."""
        if total.format.dtype == torch.float32:
            total.payload.add_(x)
            return
        # What has scales of its own goes apart: little is held in fp32 then, and that in cache.
        for rows, _ in self._row_chunks(total):
            part = total.rows(rows.start, rows.stop)
            values = self.dequantize(part).add_(x[rows])
            part.copy_(self.quantize(values, total.format, granularity=total.granularity))

    def add_rows_(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """See `Kernels`; on a CPU one row after the other."""
        total.index_add_(0, rows, values.float())

    def square_sums_and_amaxes(self, tensors: Sequence[ScaledTensor]) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        squares, amaxes = zip(*map(self._square_sum_and_amax, tensors), strict=True)
        return torch.stack(squares), torch.stack(amaxes)

    def _square_sum_and_amax(self, x: ScaledTensor) -> tuple[Tensor, Tensor]:
        square = torch.zeros((), dtype=torch.float64, device=x.device)
        amax = torch.zeros((), device=x.device)
        for start in range(0, x.payload.numel(), self.step_elements):
            block = self.dequantize(x.elements(start, start + self.step_elements))
            amax = torch.maximum(amax, self.amax(block))
            block = block.double().view(-1)
            square += torch.dot(block, block)
        return square, amax

    def sum_in_order(
        self, terms: Sequence[ScaledTensor | Tensor], dtype: torch.dtype, *, divisor: int = 1
    ) -> Tensor:
        """See `Kernels`."""
        total = torch.zeros(terms[0].shape, device=terms[0].device)
        for term in terms:
            total += self.dequantize(term) if isinstance(term, ScaledTensor) else term
        if divisor != 1:
            total.div_(divisor)
        return total.to(dtype)

    def add_in_format(self, a: ScaledTensor, b: ScaledTensor) -> ScaledTensor:
        """See `Kernels`."""
        total = self.dequantize(a) + self.dequantize(b)
        return ScaledTensor(self.cast(total, a.scale, a.format), a.scale, a.format)

    def saturated_share(self, x: ScaledTensor) -> Tensor:
        """See `Kernels`."""
        return ((x.payload & 0x7F) == largest_code(x.format)).float().mean()

    def adam(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> Tensor:
        """See `Kernels`."""
        amaxes = [
            adam_step(self, param, table, coefficients, self.step_elements) for param in params
        ]
        return torch.stack(amaxes) if amaxes else torch.zeros(0, 3, device=table.scales.device)

    def document_mask(self, documents: Documents, dtype: torch.dtype) -> DocumentMask:
        """See `Kernels`."""
        return DocumentMask.additive(documents)

    def attention(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        dropout: float,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """See `Kernels`."""
        # In fp32: torch's bf16 flash attention on CPU takes twice the time in backward.
        q, k, v = q_BNSD.float(), k_BGSD.float(), v_BGSD.float()
        if mask is None:
            context = causal_attention(q, k, v, dropout)
        else:
            context = masked_attention(q, k, v, dropout, mask)
        return context.to(q_BNSD.dtype)

    def attention_at(
        self, q_BNSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, positions_BS: Tensor
    ) -> Tensor:
        """See `Kernels`; written out in fp32, where a query's bits do not depend on the others.

        A CPU's matrix products take the same order of summation whatever the number of their rows,
        if that is a multiple of 16, and the number of keys is the cache's.
        """
        seq_length, groups = q_BNSD.shape[2], k_BGCD.shape[1]
        padding = -seq_length % ROWS_PER_TILE
        q = functional.pad(q_BNSD.float(), (0, 0, 0, padding)).unflatten(1, (groups, -1))
        positions = functional.pad(positions_BS, (0, padding))
        keys = torch.arange(k_BGCD.shape[2], device=positions.device)
        future = keys > positions[:, None, None, :, None]
        scores = q.flatten(2, 3) @ k_BGCD.float().transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.view(*q.shape[:-1], -1).masked_fill_(future, -math.inf)
        weights = scores.softmax(dim=-1).flatten(2, 3)
        context = (weights @ v_BGCD.float()).view(q.shape).flatten(1, 2)
        return context[:, :, :seq_length].to(q_BNSD.dtype)

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
        return rope.rotate_back_and_join(gradients, cos, sin, queries, heads_per_group)

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

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Kernels`."""
        if bias is None:
            return functional.rms_norm(x, x.shape[-1:], weight, eps), ()
        y, *statistics = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return y, tuple(statistics)

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
        if bias is None:
            dx, *others = _rms_norm_backward(x, weight, dy, eps)
        else:
            dx, *others = torch.ops.aten.native_layer_norm_backward(
                dy, x, x.shape[-1:], *statistics, weight, bias, [True, True, True]
            )
        return (dx if residual is None else dx + residual, *others)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return functional.gelu(x, approximate=approximate)

    def gelu_backward(self, x: Tensor, dy: Tensor, approximate: str) -> Tensor:
        """See `Kernels`."""
        return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)

    def swiglu(self, x: Tensor) -> Tensor:
        """See `Kernels`."""
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """See `Kernels`; silu(gate) is computed again."""
        gate, up = x.chunk(2, dim=-1)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return torch.cat((d_gate, dy * functional.silu(gate)), dim=-1)

    def _row_chunks(self, x: ScaledTensor) -> Iterator[tuple[slice, slice]]:
        """Rows of `x` that are worked on together, and of its scales: all where they share one."""
        num_rows, block = x.shape[0], x.granularity.rows
        if block is None:
            yield slice(0, num_rows), slice(None)
            return
        blocks_at_once = max(1, self.step_elements // (x.shape[1] * block))
        for first in range(0, -(-num_rows // block), blocks_at_once):
            stop = first + blocks_at_once
            yield slice(first * block, stop * block), slice(first, stop)

    def _blocks(self, numel: int) -> Iterator[slice]:
        for start in range(0, numel, self.block_elements):
            yield slice(start, start + self.block_elements)


def _rms_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, ...]:
    # PyTorch has a kernel for this on GPUs only: the norm is computed again for its graph.
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    with torch.enable_grad():
        y = functional.rms_norm(x, x.shape[-1:], weight, eps)
    return torch.autograd.grad(y, (x, weight), dy)


def check_gemm_operands(a: ScaledTensor, b: ScaledTensor) -> None:
    """Raise ValueError where Hopper's FP8 GEMM would refuse the operands.

    Asserted on CPU too, so that what passes there runs on the GPU: contraction lengths agree,
    every dimension is a multiple of 16, the two formats are not both E5M2, and none is E2M5.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"contraction differs: {tuple(a.shape)}, {tuple(b.shape)}")
    if torch.uint8 not in (a.format.storage, b.format.storage):
        return
    if a.format == E5M2 and b.format == E5M2:
        raise ValueError("no tensor core multiplies E5M2 by E5M2")
    if E2M5 in (a.format, b.format):
        raise ValueError("no tensor core multiplies E2M5")
    sizes = (a.shape[0], b.shape[0], a.shape[1])
    if any(size % 16 for size in sizes):
        raise ValueError(f"an FP8 GEMM needs M, N, K divisible by 16, not {sizes}")


def largest_code(fmt: Format) -> int:
    """The code of the largest finite number of an FP8 format."""
    if fmt == E2M5:
        return 0x7F
    return int(torch.tensor(fmt.max).to(fmt.dtype).view(torch.uint8))


def _decode_fp8(payload: Tensor, factor: Tensor, fmt: Format, out: Tensor) -> None:
    shift, mask, correction = _BF16_DECODE[fmt.name]
    values = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    bits = values.view(torch.int16).copy_(payload.view(torch.int8))  # repeats the sign bit
    bits.bitwise_left_shift_(shift).bitwise_and_(mask)
    # Two factors: their product can leave bf16's range although the result does not.
    values.mul_(correction)
    if values is out:
        out.mul_(factor)
    else:  # in fp32, which has smaller subnormals: beside a 0-d factor the product would be bf16's
        torch.mul(values, torch.atleast_1d(factor), out=out)


def _decode_fp16(payload: Tensor, factor: Tensor, fmt: Format, out: Tensor) -> None:
    out.copy_(payload.float().mul_(factor))
