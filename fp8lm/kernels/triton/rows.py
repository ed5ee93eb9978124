"""Casts with a scale per row, or per block of a row, which then counts as a row: one launch each.

A program holds whole rows, so that it finds their amaxes and casts in one reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import (
    MAGNITUDE,
    decode,
    encode,
    inverse_of,
    magnitude,
    scale_of,
)
from fp8lm.numerics import Format, Granularity
from fp8lm.scaled_tensor import ScaledTensor

_ELEMENTS = 4096  # of a program, unless one row has more
MAX_LENGTH = 1 << 15  # of a row: 64 numbers in each thread of 16 warps


def row_length(shape: torch.Size, granularity: Granularity) -> int | None:
    """Elements that share a scale, if they are a row or an equal part of one, and not too many."""
    if granularity.rows != 1 or not shape[-1]:
        return None
    length = granularity.columns or shape[-1]
    return length if shape[-1] % length == 0 and length <= MAX_LENGTH else None


def quantize_rows(
    x: Tensor, fmt: Format, amax: Tensor | None, granularity: Granularity, length: int
) -> ScaledTensor:
    """`x` [R,C] in `fmt` with scales of `granularity`, which are of `length` elements each."""
    payload = torch.empty(x.shape, dtype=fmt.storage, device=x.device)
    scale = torch.empty(granularity.scale_shape(x.shape), device=x.device)
    quantized = ScaledTensor(payload, scale, fmt, granularity)
    quantize_rows_into(x, quantized, amax, length)
    return quantized


def quantize_rows_into(x: Tensor, target: ScaledTensor, amax: Tensor | None, length: int) -> None:
    """The same into `target`, whose payload and scales are contiguous."""
    x, payload, scale = x.contiguous(), target.payload, target.scale
    width, at_once = rows_at_once(length)
    amax = None if amax is None else amax.contiguous().view(torch.int32)
    launch(
        cast_rows,
        (triton.cdiv(scale.numel(), at_once),),
        x,
        scale if amax is None else amax,
        payload,
        scale,
        scale.numel(),
        length,
        reads=[x] if amax is None else [x, amax],
        writes=[payload, scale],
        FORMAT=target.format.name,
        AMAX_IS_KNOWN=amax is not None,
        ROWS=at_once,
        WIDTH=width,
        num_warps=warps(width),
    )


def dequantize_rows(x: ScaledTensor, dtype: torch.dtype, length: int) -> Tensor:
    """Values of `x`, whose payload and scales are contiguous, in `dtype`."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    width, at_once = rows_at_once(length)
    launch(
        decode_rows,
        (triton.cdiv(x.scale.numel(), at_once),),
        x.payload,
        x.scale,
        values,
        x.scale.numel(),
        length,
        reads=[x.payload, x.scale],
        writes=[values],
        FORMAT=x.format.name,
        ROWS=at_once,
        WIDTH=width,
        num_warps=warps(width),
    )
    return values


def rows_at_once(length: int) -> tuple[int, int]:
    """Padded length of a row, and rows of a program."""
    width = triton.next_power_of_2(length)
    return width, max(1, _ELEMENTS // width)


def warps(width: int) -> int:
    """Of a program that holds rows of this padded length."""
    return min(16, max(4, width // 1024))


@triton.jit
def group(first, num_rows, length, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `first` on, the place of their elements [ROWS, WIDTH], and which of these exist."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * length + columns[None, :]
    return rows, place, (rows < num_rows)[:, None] & (columns < length)[None, :]


@triton.jit
def unscale_rows(value, scale, FORMAT: tl.constexpr):
    """`value` [ROWS, WIDTH] / `scale` [ROWS], which is a power of two but for E2M5."""
    if FORMAT == "fp8_e2m5":
        value = tl.math.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    else:
        value = value * inverse_of(scale)[:, None]
    return value


@triton.jit
def cast_rows(
    x_ptr,
    amax_ptr,
    payload_ptr,
    scale_ptr,
    num_rows,
    length,
    FORMAT: tl.constexpr,
    AMAX_IS_KNOWN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The kernel of `quantize_rows`."""
    rows, place, inside = group(tl.program_id(0) * ROWS, num_rows, length, ROWS, WIDTH)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if AMAX_IS_KNOWN:
        amax = tl.load(amax_ptr + rows, mask=rows < num_rows, other=0) & MAGNITUDE
    else:
        amax = tl.max(magnitude(x), axis=1)
    scale = scale_of(amax, FORMAT)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    tl.store(payload_ptr + place, encode(x * scale[:, None], FORMAT), mask=inside)


@triton.jit
def decode_rows(
    payload_ptr,
    scale_ptr,
    values_ptr,
    num_rows,
    length,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The kernel of `dequantize_rows`."""
    rows, place, inside = group(tl.program_id(0) * ROWS, num_rows, length, ROWS, WIDTH)
    scale = tl.load(scale_ptr + rows, mask=rows < num_rows, other=1.0)
    value = decode(tl.load(payload_ptr + place, mask=inside, other=0), FORMAT)
    tl.store(values_ptr + place, unscale_rows(value, scale, FORMAT), mask=inside)
