"""Casts of a tensor with one scale: to a format, in both orientations of a matrix, and back.

A cast finds the scale itself, from the partial maxima that `fp8lm.kernels.triton.amax` leaves or
from the amax that is known (their bits, int32 [parts]). It writes the scale and its inverse, which
the GEMM wants, beside the payload. So `quantize` is two launches, and one where the amax is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS, largest_of
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, encode, inverse_of, scale_of
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

BLOCK = 4096  # of consecutive elements
TILE = 128  # rows and columns of a tile that is transposed


def quantize(x: Tensor, fmt: Format, amaxes: Tensor) -> ScaledTensor:
    """`x` (any shape) in the scaled `fmt` with the scale of the largest of `amaxes`."""
    x = x.contiguous()
    payload = torch.empty(x.shape, dtype=fmt.storage, device=x.device)
    scale, inverse = (torch.empty((), device=x.device) for _ in range(2))
    launch(
        cast_from_amax,
        (max(1, triton.cdiv(x.numel(), BLOCK)),),
        x,
        amaxes,
        payload,
        scale,
        inverse,
        x.numel(),
        amaxes.numel(),
        reads=[x, amaxes],
        writes=[payload, scale, inverse],
        FORMAT=fmt.name,
        PARTS=_padded(amaxes),
        BLOCK=BLOCK,
    )
    return ScaledTensor(payload, scale, fmt, inverse=inverse)


def quantize_with_transpose(
    x: Tensor, fmt: Format, amaxes: Tensor, *, sums: bool = False
) -> tuple[ScaledTensor, ScaledTensor, Tensor | None]:
    """`x` [R,C] as `quantize` gives it, and its transposed [C,R], from one reading of `x`.

    With `sums` those of the columns of every tile, fp32 [tiles, C], in an order that is fixed.
    """
    x = x.contiguous()
    rows, columns = x.shape
    payload = torch.empty(rows, columns, dtype=fmt.storage, device=x.device)
    transposed = torch.empty(columns, rows, dtype=fmt.storage, device=x.device)
    scale, inverse = (torch.empty((), device=x.device) for _ in range(2))
    grid = tiles(rows, columns)
    of_tiles = torch.empty(grid[1], columns, device=x.device) if sums else None
    launch(
        cast_with_transpose,
        grid,
        x,
        amaxes,
        payload,
        transposed,
        scale,
        inverse,
        scale if of_tiles is None else of_tiles,
        rows,
        columns,
        amaxes.numel(),
        reads=[x, amaxes],
        writes=[payload, transposed, scale, inverse, *([] if of_tiles is None else [of_tiles])],
        FORMAT=fmt.name,
        SUMS=sums,
        PARTS=_padded(amaxes),
        TILE=TILE,
        num_warps=16 if sums else 8,  # the numbers stay in registers until they are added
    )
    return (
        ScaledTensor(payload, scale, fmt, inverse=inverse),
        ScaledTensor(transposed, scale, fmt, inverse=inverse),
        of_tiles,
    )


def cast(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """`x * scale` (0-d) in the scaled `fmt`."""
    x = x.contiguous()
    payload = torch.empty(x.shape, dtype=fmt.storage, device=x.device)
    launch(
        cast_with_scale,
        (max(1, triton.cdiv(x.numel(), BLOCK)),),
        x,
        scale,
        payload,
        x.numel(),
        reads=[x, scale],
        writes=[payload],
        FORMAT=fmt.name,
        BLOCK=BLOCK,
    )
    return payload


def dequantize(x: ScaledTensor, dtype: torch.dtype) -> Tensor:
    """Values of `x`, whose payload is contiguous, in `dtype`."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(
        decode_with_scale,
        (max(1, triton.cdiv(values.numel(), BLOCK)),),
        x.payload,
        x.scale,
        values,
        values.numel(),
        reads=[x.payload, x.scale],
        writes=[values],
        FORMAT=x.format.name,
        BLOCK=BLOCK,
    )
    return values


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """The grid of kernels that transpose; neighbours share rows."""
    return max(1, triton.cdiv(columns, TILE)), max(1, triton.cdiv(rows, TILE))


def _padded(amaxes: Tensor) -> int:
    # Two variants of a kernel to compile, not one for every size.
    return 1 if amaxes.numel() == 1 else MAX_PARTS


@triton.jit
def cast_from_amax(
    x_ptr,
    amax_ptr,
    payload_ptr,
    scale_ptr,
    inverse_ptr,
    numel,
    parts,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `quantize`."""
    scale = scale_of(largest_of(amax_ptr, parts, PARTS), FORMAT)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
        tl.store(inverse_ptr, inverse_of(scale))
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel).to(tl.float32)
    tl.store(payload_ptr + offsets, encode(x * scale, FORMAT), mask=offsets < numel)


@triton.jit
def cast_with_transpose(
    x_ptr,
    amax_ptr,
    payload_ptr,
    transposed_ptr,
    scale_ptr,
    inverse_ptr,
    sums_ptr,
    num_rows,
    num_columns,
    parts,
    FORMAT: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The kernel of `quantize_with_transpose`; a program has one tile."""
    scale = scale_of(largest_of(amax_ptr, parts, PARTS), FORMAT)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
        tl.store(inverse_ptr, inverse_of(scale))
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SUMS:
        of_tile = sums_ptr + tl.program_id(1).to(tl.int64) * num_columns
        tl.store(of_tile + columns, tl.sum(x, axis=0), mask=columns < num_columns)
    codes = encode(x * scale, FORMAT)
    tl.store(payload_ptr + place, codes, mask=inside)
    place = columns.to(tl.int64)[:, None] * num_rows + rows[None, :]
    inside = (columns < num_columns)[:, None] & (rows < num_rows)[None, :]
    tl.store(transposed_ptr + place, tl.trans(codes), mask=inside)


@triton.jit
def cast_with_scale(
    x_ptr, scale_ptr, payload_ptr, numel, FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The kernel of `cast`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel).to(tl.float32)
    tl.store(payload_ptr + offsets, encode(x * tl.load(scale_ptr), FORMAT), mask=offsets < numel)


@triton.jit
def decode_with_scale(
    payload_ptr, scale_ptr, values_ptr, numel, FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The kernel of `dequantize`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(payload_ptr + offsets, mask=offsets < numel)
    values = decode(code, FORMAT) * inverse_of(tl.load(scale_ptr))
    tl.store(values_ptr + offsets, values, mask=offsets < numel)
