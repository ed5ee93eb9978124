"""Sums of weight gradients in FP8, in place: the addition, the new scale and the cast.

One scale per tensor takes two launches, as the amax of the sum has to be known before the cast;
a scale per block of a row takes one, as a program holds whole blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS, largest_of, num_parts
from fp8lm.kernels.triton.cast import BLOCK
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, encode, inverse_of, magnitude, scale_of
from fp8lm.kernels.triton.rows import group, rows_at_once, unscale_rows, warps
from fp8lm.scaled_tensor import ScaledTensor


def accumulate_per_tensor(total: ScaledTensor, x: Tensor) -> None:
    """`total += x`; its payload is contiguous, and all of it has one scale."""
    x, numel = x.contiguous(), x.numel()
    parts = num_parts(numel, BLOCK)
    amaxes = torch.empty(parts, dtype=torch.int32, device=x.device)
    inverse = torch.empty((), device=x.device)  # of the old scale, which the second launch replaces
    launch(
        amax_of_sum,
        (parts,),
        total.payload,
        total.scale,
        x,
        amaxes,
        inverse,
        numel,
        reads=[total.payload, total.scale, x],
        writes=[amaxes, inverse],
        FORMAT=total.format.name,
        BLOCK=BLOCK,
    )
    launch(
        cast_of_sum,
        (max(1, triton.cdiv(numel, BLOCK)),),
        total.payload,
        inverse,
        x,
        amaxes,
        total.scale,
        numel,
        parts,
        reads=[total.payload, inverse, x, amaxes],
        writes=[total.payload, total.scale],
        FORMAT=total.format.name,
        PARTS=MAX_PARTS,
        BLOCK=BLOCK,
    )


def accumulate_per_row(total: ScaledTensor, x: Tensor) -> None:
    """`total += x`; each of its rows [n, block] has a scale."""
    x = x.contiguous()
    num_rows, length = x.shape
    width, at_once = rows_at_once(length)
    launch(
        accumulate_rows,
        (triton.cdiv(num_rows, at_once),),
        total.payload,
        total.scale,
        x,
        num_rows,
        length,
        reads=[total.payload, total.scale, x],
        writes=[total.payload, total.scale],
        FORMAT=total.format.name,
        ROWS=at_once,
        WIDTH=width,
        num_warps=warps(width),
    )


@triton.jit
def amax_of_sum(
    total_ptr,
    scale_ptr,
    x_ptr,
    amax_ptr,
    inverse_ptr,
    numel,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial maxima of |total + x|, as `partial_amax` has them; and the inverse of the scale."""
    inverse = inverse_of(tl.load(scale_ptr))
    if tl.program_id(0) == 0:
        tl.store(inverse_ptr, inverse)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        inside = start + offsets < numel
        code = tl.load(total_ptr + start + offsets, mask=inside, other=0)
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(decode(code, FORMAT) * inverse + x))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def cast_of_sum(
    total_ptr,
    inverse_ptr,
    x_ptr,
    amax_ptr,
    scale_ptr,
    numel,
    parts,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`total + x` with the scale of its amax, in place."""
    scale = scale_of(largest_of(amax_ptr, parts, PARTS), FORMAT)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    code = tl.load(total_ptr + offsets, mask=inside, other=0)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sum = decode(code, FORMAT) * tl.load(inverse_ptr) + x
    tl.store(total_ptr + offsets, encode(sum * scale, FORMAT), mask=inside)


@triton.jit
def accumulate_rows(
    total_ptr,
    scale_ptr,
    x_ptr,
    num_rows,
    length,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The kernel of `accumulate_per_row`."""
    rows, place, inside = group(tl.program_id(0) * ROWS, num_rows, length, ROWS, WIDTH)
    old = tl.load(scale_ptr + rows, mask=rows < num_rows, other=1.0)
    code = tl.load(total_ptr + place, mask=inside, other=0)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    sum = unscale_rows(decode(code, FORMAT), old, FORMAT) + x
    scale = scale_of(tl.max(magnitude(sum), axis=1), FORMAT)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    tl.store(total_ptr + place, encode(sum * scale[:, None], FORMAT), mask=inside)
