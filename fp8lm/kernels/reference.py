"""Eager PyTorch kernels: the CPU path, and the oracle every faster kernel must match bit for bit.

    cast    payload = round_to_nearest_even(saturate(x * scale))
    decode  x = payload / scale                       (exact in bf16: scales are powers of two)
    gemm    D[M,N] = A[M,K] @ B[N,K]^T                fp32 accumulation, bf16 out

All finite FP8 values are exact in bf16, so on a CPU, which has no FP8 arithmetic, a bf16 GEMM of
decoded operands *is* the FP8 GEMM up to the rounding of its output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fp8lm.numerics import E4M3, E5M2, FP16, Format

# Bits of an FP8 code moved to where bf16 keeps its exponent and mantissa, and the power of two
# that corrects for the different exponent bias (127 - 7 and 127 - 15). Subnormals come out right
# because the correction is a multiplication: (shift, mask as a signed int16, correction).
_BF16_DECODE = {
    E4M3.name: (4, 0x87F0 - 0x10000, 2.0**120),
    E5M2.name: (5, 0x8FE0 - 0x10000, 2.0**112),
}


class ReferenceKernels:
    """Kernels in eager PyTorch; device-agnostic, no host synchronisation on a GPU.

    Large tensors are cast and decoded in blocks of `block_elements`: the several operations of a
    cast then run in cache, and only its input and output touch memory. So does an optimizer step
    over blocks of `step_elements`, with several tensors at once.
    """

    block_elements = 1 << 17
    step_elements = 1 << 16
    # What a person is told of them.
    gemm_by = "decoded operands in a BF16 GEMM: FP8's arithmetic, not its speed"
    attention_by = "scaled_dot_product_attention in fp32"
    elementwise_by = "eager PyTorch, in blocks that stay in cache"

    def amax(self, x: Tensor) -> Tensor:
        """Absolute maximum of `x` (any float dtype) as a 0-d fp32 tensor; NaN and Inf survive.

        One pass: `aminmax` propagates NaN, where `max` of `abs` may not and is 10 times slower.
        """
        low, high = torch.aminmax(x)
        # abs() last: a maximum of zero could otherwise be -0.0, whose bits are not 0.
        return torch.maximum(-low, high).abs().float()

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """`x * scale` in `fmt`, saturated, rounded to nearest even; payload of dtype `fmt.storage`.

        NaN stays NaN. Clamping is explicit: torch's own FP8 cast saturates, gives NaN or gives
        Inf, depending on format and version. `saturate=False` leaves it out where the caller
        knows that no `x * scale` exceeds `fmt.max` (the scale comes from the amax of `x`).
        """
        if not fmt.scaled:
            return x.to(fmt.dtype)
        payload = torch.empty(x.shape, dtype=fmt.storage, device=x.device)
        source, target = x.reshape(-1), payload.view(fmt.dtype).view(-1)
        # In bf16 FP16's largest number would itself be rounded up, beyond FP16.
        work_dtype = torch.float32 if fmt == FP16 else x.dtype
        for block in self._blocks(x.numel()):
            scaled = torch.mul(source[block].to(work_dtype), scale)
            if saturate:
                scaled = scaled.clamp_(-fmt.max, fmt.max)
            target[block].copy_(scaled)
        return payload

    def dequantize(self, payload: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        """Values of `payload` (dtype `fmt.storage`) in `dtype` (bf16 or fp32), `payload / scale`.

        FP8 codes are decoded through integer shifts (8 times faster than torch's cast on CPU).
        NaN codes occur only together with a NaN scale (`cast` and `scale_from_amax` see to it),
        which is what makes the result NaN. An unscaled format may return `payload` itself.
        """
        if not fmt.scaled:
            return payload.to(dtype)
        if payload.ndim == 2 and payload.t().is_contiguous():  # decode it as it lies in memory
            return self._decode(payload.t(), scale, fmt, dtype).t()
        return self._decode(payload.contiguous(), scale, fmt, dtype)

    def _decode(self, payload: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        values = torch.empty(payload.shape, dtype=dtype, device=payload.device)
        source, target = payload.view(-1), values.view(-1)
        factor = scale.reciprocal()
        for block in self._blocks(payload.numel()):
            decode_block = _decode_fp16 if fmt == FP16 else _decode_fp8
            decode_block(source[block], factor, fmt, target[block])
        return values

    def gemm(
        self,
        a: tuple[Tensor, Tensor, Format],
        b: tuple[Tensor, Tensor, Format],
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        fast_accumulation: bool = False,
    ) -> Tensor:
        """`A[M,K] @ B[N,K]^T` of (payload, scale, format) operands; [M,N] in `out_dtype`.

        `fast_accumulation` is a permission that only tensor cores use.
        """
        check_gemm_operands(a, b)
        compute_dtype = torch.float32 if out_dtype == torch.float32 else torch.bfloat16
        return torch.mm(self.dequantize(*a, compute_dtype), self.dequantize(*b, compute_dtype).t())

    def attention(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float) -> Tensor:
        """Causal `scaled_dot_product_attention`, [B,N,S,D] in the dtype of `q_BNSD`.

        Computed in fp32: torch's bf16 flash attention on CPU takes twice the time in backward.
        """
        context = causal_attention(q_BNSD.float(), k_BGSD.float(), v_BGSD.float(), dropout)
        return context.to(q_BNSD.dtype)

    def _blocks(self, numel: int) -> Iterator[slice]:
        for start in range(0, numel, self.block_elements):
            yield slice(start, start + self.block_elements)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def check_gemm_operands(a: tuple[Tensor, Tensor, Format], b: tuple[Tensor, Tensor, Format]) -> None:
    """Raise ValueError where Hopper's FP8 GEMM would refuse the operands.

    Asserted on CPU too, so that what passes there runs on the GPU: contraction lengths agree,
    every dimension is a multiple of 16, and the two formats are not both E5M2.
    """
    (a_payload, _, a_format), (b_payload, _, b_format) = a, b
    if a_payload.shape[1] != b_payload.shape[1]:
        raise ValueError(f"contraction differs: {tuple(a_payload.shape)}, {tuple(b_payload.shape)}")
    if a_format.storage != torch.uint8 and b_format.storage != torch.uint8:
        return
    if a_format == E5M2 and b_format == E5M2:
        raise ValueError("no tensor core multiplies E5M2 by E5M2")
    sizes = (a_payload.shape[0], b_payload.shape[0], a_payload.shape[1])
    if any(size % 16 for size in sizes):
        raise ValueError(f"an FP8 GEMM needs M, N, K divisible by 16, not {sizes}")


def _decode_fp8(payload: Tensor, factor: Tensor, fmt: Format, out: Tensor) -> None:
    shift, mask, correction = _BF16_DECODE[fmt.name]
    values = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    bits = values.view(torch.int16).copy_(payload.view(torch.int8))  # repeats the sign bit
    bits.bitwise_left_shift_(shift).bitwise_and_(mask)
    # Two factors: their product can leave bf16's range although the result does not.
    values.mul_(correction).mul_(factor)
    if values is not out:
        out.copy_(values)


def _decode_fp16(payload: Tensor, factor: Tensor, fmt: Format, out: Tensor) -> None:
    out.copy_(payload.float().mul_(factor))
