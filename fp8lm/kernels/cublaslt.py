"""The FP8 GEMM of tensor cores (sm_89 and newer), cuBLASLt's through PyTorch.

    scales                                  GPUs, CUDA                through
    per tensor by per tensor                8.9 and newer             torch._scaled_mm
    per row by per row (or per tensor)      8.9 and newer             torch._scaled_mm
    1 x 128 by 1 x 128, or by 128 x 128     9.0 (Hopper), from 12.9   torch.nn.functional.scaled_mm

`torch._scaled_mm` reads scales of blocks without their padding, and gives wrong products. No other
pair has a GEMM; MXFP8's is that of Blackwell's tensor cores, for which there are no kernels here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from fp8lm.kernels.reference import check_gemm_operands
from fp8lm.numerics import (
    BLOCK_1X128,
    BLOCK_128X128,
    MX_1X32,
    PER_ROW,
    PER_TENSOR,
    Granularity,
)
from fp8lm.scaled_tensor import ScaledTensor

DESCRIPTION = "FP8 tensor cores through torch._scaled_mm (cuBLASLt)"
BLOCKS_CAPABILITY, BLOCKS_CUDA = (9, 0), (12, 9)
_RECIPES = {BLOCK_1X128: ScalingType.BlockWise1x128, BLOCK_128X128: ScalingType.BlockWise128x128}
_SIDE = 128  # of blocks
_PADDING = 4  # blocks along K of a matrix of 128 x 128: cuBLASLt reads them in fours


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    """`Kernels.gemm` of FP8 operands.

    Hopper's FP8 tensor cores read both with the contraction dimension contiguous: ValueError for
    others, instead of a silent copy, and for scales that they have no GEMM for.
    """
    check_gemm_operands(a, b)
    for operand in (a, b):
        if not operand.payload.is_contiguous():
            raise ValueError(f"the contraction of {operand} is not contiguous: transpose it")
    if problem := missing_gemm(a.granularity, b.granularity):
        raise ValueError(problem)
    if a.granularity in _RECIPES:
        product = _product_of_blocks(a, b, out_dtype)
        return product if bias is None else product.add_(bias)
    scale_a, scale_b = a.inverse_scale(), b.inverse_scale()
    if not a.granularity.is_per_tensor or not b.granularity.is_per_tensor:
        scale_a, scale_b = _of_rows(scale_a, a.shape[0]), _of_rows(scale_b, b.shape[0]).t()
    return torch._scaled_mm(  # noqa: SLF001 (the public one has no CPU kernel)
        a.fp8,
        b.fp8.t(),
        scale_a=scale_a,
        scale_b=scale_b,
        bias=bias,
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulation,
    )


def bf16_gemm(a: ScaledTensor, b: ScaledTensor, bias: Tensor) -> Tensor:
    """`Kernels.gemm` of BF16 operands, whose bias is added to the fp32 sum: one rounding."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"contraction differs: {tuple(a.shape)}, {tuple(b.shape)}")
    return torch.addmm(bias, a.payload, b.payload.t())


def missing_gemm(a: Granularity, b: Granularity) -> str | None:
    """That no GEMM multiplies operands with these scales, if so."""
    rows = {a, b} <= {PER_TENSOR, PER_ROW}
    blocks = {a, b} <= _RECIPES.keys() and BLOCK_1X128 in (a, b)
    return None if rows or blocks else f"cuBLASLt has no GEMM of scales {a} by scales {b}"


def why_unsupported(
    a: Granularity, b: Granularity, capability: tuple[int, int], cuda: str | None
) -> str | None:
    """Why a GPU of this compute capability, or this `cuda`, has no GEMM of such scales."""
    if MX_1X32 in (a, b):
        return "MXFP8's tensor cores are Blackwell's, for which there are no kernels here"
    if problem := missing_gemm(a, b):
        return problem
    if a not in _RECIPES:
        return None
    if capability != BLOCKS_CAPABILITY:
        return "PyTorch has scales per block of 128 on compute capability 9.0 (Hopper) alone"
    version = tuple(map(int, cuda.split(".")[:2])) if cuda else ()
    if version < BLOCKS_CUDA:
        return f"scales per block of 128 need CUDA 12.9 or newer, and torch is built for {cuda}"
    return None


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """A scale per row, [rows, 1], or the tensor's for each."""
    return scale.expand(rows, 1).contiguous()


def _product_of_blocks(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype) -> Tensor:
    for operand in (a, b):
        square = operand.granularity == BLOCK_128X128
        if operand.shape[1] % _SIDE or (square and operand.shape[0] % _SIDE):
            raise ValueError(f"cuBLASLt has no GEMM of {operand}: whole blocks of 128 alone")
    return scaled_mm(
        a.fp8,
        b.fp8.t(),
        _scales_of_blocks(a),
        _RECIPES[a.granularity],
        _scales_of_blocks(b),
        _RECIPES[b.granularity],
        output_dtype=out_dtype,
    )


def _scales_of_blocks(x: ScaledTensor) -> Tensor:
    """1 x 128: [R, K/128], of 128 x 128: [K/128 padded, R/128]; both contiguous along R or K."""
    inverse = x.inverse_scale()
    if x.granularity == BLOCK_1X128:
        return inverse.t().contiguous().t()
    padded = inverse.new_zeros(inverse.shape[0], -(-inverse.shape[1] // _PADDING) * _PADDING)
    padded[:, : inverse.shape[1]] = inverse
    return padded.t()
