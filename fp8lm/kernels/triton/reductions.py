"""The sum of squares and the amax of a tensor in any format, in two launches.

Squares and their sum are fp64, in an order of their own: n terms of one sign, so that the relative
error is below n 2^-53, as that of any order is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS, num_parts
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, inverse_of, magnitude
from fp8lm.kernels.triton.rows import group, rows_at_once, unscale_rows
from fp8lm.scaled_tensor import ScaledTensor

_BLOCK = 2048


def square_sum_and_amax(x: ScaledTensor) -> tuple[Tensor, Tensor]:
    """0-d fp64 and fp32; `x` is contiguous, with one scale for all or for each of its rows."""
    numel, device = x.payload.numel(), x.device
    parts = num_parts(numel, _BLOCK)
    sums = torch.empty(parts, dtype=torch.float64, device=device)
    amaxes = torch.empty(parts, dtype=torch.int32, device=device)
    operands = (x.payload, x.scale, sums, amaxes)
    if x.granularity.is_per_tensor:
        launch(
            square_sums,
            (parts,),
            *operands,
            numel,
            reads=[x.payload, x.scale],
            writes=[sums, amaxes],
            FORMAT=x.format.name,
            BLOCK=_BLOCK,
        )
    else:
        width, _ = rows_at_once(x.shape[1])
        launch(
            square_sums_of_rows,
            (parts,),
            *operands,
            *x.shape,
            reads=[x.payload, x.scale],
            writes=[sums, amaxes],
            FORMAT=x.format.name,
            ROWS=max(1, _BLOCK // width),
            WIDTH=width,
        )
    square, amax = (
        torch.empty((), dtype=torch.float64, device=device),
        torch.empty((), device=device),
    )
    launch(
        finish,
        (1,),
        sums,
        amaxes,
        square,
        amax,
        parts,
        reads=[sums, amaxes],
        writes=[square, amax],
        PARTS=MAX_PARTS,
    )
    return square, amax


@triton.jit
def square_sums(
    payload_ptr,
    scale_ptr,
    sum_ptr,
    amax_ptr,
    numel,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program's sum of squares, and the bits of its amax."""
    inverse = inverse_of(tl.load(scale_ptr))
    offsets = tl.arange(0, BLOCK)
    total, largest = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        code = tl.load(payload_ptr + start + offsets, mask=start + offsets < numel, other=0)
        value = decode(code, FORMAT) * inverse
        largest = tl.maximum(largest, magnitude(value))
        total += value.to(tl.float64) * value.to(tl.float64)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def square_sums_of_rows(
    payload_ptr,
    scale_ptr,
    sum_ptr,
    amax_ptr,
    num_rows,
    length,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same of rows with a scale each."""
    total, largest = tl.zeros((ROWS, WIDTH), tl.float64), tl.zeros((ROWS, WIDTH), tl.int32)
    for start in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows, place, inside = group(start, num_rows, length, ROWS, WIDTH)
        scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=1.0)
        code = tl.load(payload_ptr + place, mask=inside, other=0)
        value = unscale_rows(decode(code, FORMAT), scale, FORMAT)
        largest = tl.maximum(largest, magnitude(value))
        total += value.to(tl.float64) * value.to(tl.float64)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def finish(sums_ptr, amaxes_ptr, sum_ptr, amax_ptr, parts, PARTS: tl.constexpr):
    """The sum and the amax of what all programs found."""
    index = tl.arange(0, PARTS)
    sums = tl.load(sums_ptr + index, mask=index < parts, other=0.0)
    amaxes = tl.load(amaxes_ptr + index, mask=index < parts, other=0)
    tl.store(sum_ptr, tl.sum(sums, axis=0))
    tl.store(amax_ptr, tl.max(amaxes, axis=0).to(tl.float32, bitcast=True))
