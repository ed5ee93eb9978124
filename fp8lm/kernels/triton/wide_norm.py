"""LayerNorm and RMSNorm of rows that do not fit into the registers of a program: in blocks.

Forward is one launch: a program reads a row block by block, from memory once and again from the
cache. In backward the gradient of an element depends on two sums over its row; so one launch finds
these, and a second one has a program for every block of columns, in which it goes through the rows
and adds up the gradients of weight and bias, as `norm` does for whole rows. A third adds those up
over the programs, in their order.

Rounding is that of `norm`. Shapes: R rows (tokens), C columns (features).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS
from fp8lm.kernels.triton.column_sums import add_over_programs
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.norm import (
    TOGETHER,
    Statistics,
    larger,
    normalized,
    store_gradient,
    store_sums,
)

_BLOCK = 4096  # columns that a program holds
_BACKWARD_PROGRAMS = 128  # of the rows, for every block of columns


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Statistics, Tensor]:
    """See `Kernels.norm`; last the maxima of parts of the result (see `amax`)."""
    x = x.contiguous()
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    y = torch.empty_like(x)
    rstd = torch.empty(num_rows, device=x.device)
    mean = rstd if bias is None else torch.empty_like(rstd)
    programs = max(1, min(num_rows, MAX_PARTS))
    amaxes = torch.empty(programs, dtype=torch.int32, device=x.device)
    parameters = [weight] if bias is None else [weight, bias]
    statistics = (rstd,) if bias is None else (mean, rstd)
    launch(
        normalize_blocks,
        (programs,),
        x,
        weight,
        weight if bias is None else bias,
        y,
        mean,
        rstd,
        amaxes,
        num_rows,
        columns,
        eps,
        reads=[x, *parameters],
        writes=[y, *statistics, amaxes],
        IS_CENTERED=bias is not None,
        BLOCK=_BLOCK,
        num_warps=16,
    )
    return y, statistics, amaxes


def norm_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Statistics,
    dy: Tensor,
    residual: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """See `Kernels.norm_backward`; and the maxima of parts of the gradient of `x`."""
    x, dy = x.contiguous(), dy.contiguous()
    added = [] if residual is None else [residual.contiguous()]
    columns = x.shape[-1]
    num_rows, blocks = x.numel() // columns, triton.cdiv(columns, _BLOCK)
    means = torch.empty(2 if bias is not None else 1, num_rows, device=x.device)
    launch(
        row_means,
        (max(1, min(num_rows, MAX_PARTS)),),
        x,
        weight,
        statistics[0],
        statistics[-1],
        dy,
        means,
        num_rows,
        columns,
        reads=[x, weight, *statistics, dy],
        writes=[means],
        IS_CENTERED=bias is not None,
        BLOCK=_BLOCK,
        num_warps=16,
    )
    dx = torch.empty_like(x)
    programs = max(1, min(num_rows, _BACKWARD_PROGRAMS))
    amaxes = torch.empty(programs * blocks, dtype=torch.int32, device=x.device)
    sums = torch.empty(len(means), programs, columns, device=x.device)
    launch(
        block_gradients,
        (programs, blocks),
        x,
        weight,
        statistics[0],
        statistics[-1],
        means,
        dy,
        added[0] if added else dy,
        dx,
        sums,
        amaxes,
        num_rows,
        columns,
        reads=[x, weight, *statistics, means, dy, *added],
        writes=[dx, sums, amaxes],
        IS_CENTERED=bias is not None,
        ADDS=bool(added),
        BLOCK=_BLOCK,
        num_warps=16,
    )
    of_parameters = add_over_programs(sums, weight.dtype)
    return (dx, *of_parameters.unbind()), amaxes


@triton.jit
def normalize_blocks(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    eps,
    IS_CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `norm`."""
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK // TOGETHER,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, num_rows, step):
        place = row * num_columns
        mean = 0.0
        if IS_CENTERED:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_columns, BLOCK):
                columns = start + offsets
                read = tl.load(x_ptr + place + columns, mask=columns < num_columns, other=0.0)
                total += read.to(tl.float32)
            mean = tl.sum(total, axis=0) / num_columns
            tl.store(mean_ptr + row, mean)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_columns, BLOCK):
            columns = start + offsets
            inside = columns < num_columns
            x = tl.load(x_ptr + place + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - mean, 0.0)
            squares += x * x
        variance = tl.sum(squares, axis=0) / num_columns
        rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))
        tl.store(rstd_ptr + row, rstd)
        for start in range(0, num_columns, BLOCK):
            columns = start + offsets
            inside = columns < num_columns
            loaded = tl.load(x_ptr + place + columns, mask=inside, other=0.0)
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            y = (loaded.to(tl.float32) - mean) * rstd * weight
            if IS_CENTERED:
                y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            y = y.to(loaded.dtype)
            tl.store(y_ptr + place + columns, y, mask=inside)
            largest = larger(largest, y, inside)
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def row_means(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    means_ptr,
    num_rows,
    num_columns,
    IS_CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of every row the means of dy weight times the normalized x and, if centered, of dy weight."""
    offsets = tl.arange(0, BLOCK)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, num_rows, step):
        place = row * num_columns
        rstd = tl.load(rstd_ptr + row)
        mean = 0.0
        if IS_CENTERED:
            mean = tl.load(mean_ptr + row)
        products, gradients = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_columns, BLOCK):
            columns = start + offsets
            inside = columns < num_columns
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + place + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + place + columns, mask=inside, other=0.0).to(tl.float32)
            g = dy * weight
            products += g * (tl.where(inside, x - mean, 0.0) * rstd)
            gradients += g
        tl.store(means_ptr + row, tl.sum(products, axis=0) / num_columns)
        if IS_CENTERED:
            tl.store(means_ptr + num_rows + row, tl.sum(gradients, axis=0) / num_columns)


@triton.jit
def block_gradients(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dy_ptr,
    residual_ptr,
    dx_ptr,
    sum_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    IS_CENTERED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of a block of columns; sums are of weight and bias, [2 (or 1), programs, C]."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK // TOGETHER,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, num_rows, step):
        place = row * num_columns + columns
        rstd = tl.load(rstd_ptr + row)
        x = normalized(x_ptr + place, mean_ptr + row, rstd, inside, IS_CENTERED)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += dy * x
        dx = dy * weight - x * tl.load(means_ptr + row)
        if IS_CENTERED:
            d_bias += dy
            dx -= tl.load(means_ptr + num_rows + row)
        dx = store_gradient(dx_ptr + place, dx * rstd, residual_ptr + place, inside, ADDS)
        largest = larger(largest, dx, inside)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(amax_ptr + part, tl.max(largest, axis=0))
    store_sums(sum_ptr, columns, d_weight, d_bias, num_columns, IS_CENTERED)
