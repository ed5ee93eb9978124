"""LayerNorm and RMSNorm: a launch in forward, two in backward, with the amaxes of what they make.

A program normalizes rows, one at a time in registers, with statistics in fp32. In backward it adds
up the gradients of weight and bias over its rows (fp32, in the order of the rows), and leaves them
for a second launch to add up over the programs, in their order: the result is the same every time.
The gradient that the residual path brings is added in the same pass.

Statistics are fp32 sums of C terms in an order of their own, off by at most C 2^-24 of the sum of
their magnitudes; the rest is rounded as PyTorch does, once at the end.

Shapes: R rows (tokens), C columns (features).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS
from fp8lm.kernels.triton.column_sums import add_over_programs
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import magnitude

MAX_COLUMNS = 8192  # whose gradients fit into the registers of a program; others: `wide_norm`
_BACKWARD_PROGRAMS = 256  # about two on every multiprocessor of a Hopper GPU
TOGETHER = tl.constexpr(8)  # neighbouring numbers that a thread holds

Statistics = tuple[Tensor, ...]  # of every row: mean and 1 / deviation, or 1 / root mean square


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Statistics, Tensor]:
    """See `Kernels.norm`; last the maxima of parts of the result (see `amax`)."""
    x = x.contiguous()
    num_rows, columns = _rows_of(x)
    y = torch.empty_like(x)
    rstd = torch.empty(num_rows, device=x.device)
    mean = rstd if bias is None else torch.empty_like(rstd)
    programs = max(1, min(num_rows, MAX_PARTS))
    amaxes = torch.empty(programs, dtype=torch.int32, device=x.device)
    parameters = [weight] if bias is None else [weight, bias]
    statistics = (rstd,) if bias is None else (mean, rstd)
    width = triton.next_power_of_2(columns)
    launch(
        normalize,
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
        WIDTH=max(width, TOGETHER.value),
        num_warps=_warps(width),
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
    num_rows, columns = _rows_of(x)
    dx = torch.empty_like(x)
    programs = max(1, min(num_rows, _BACKWARD_PROGRAMS))
    amaxes = torch.empty(programs, dtype=torch.int32, device=x.device)
    parameters = [weight] if bias is None else [weight, bias]
    sums = torch.empty(len(parameters), programs, columns, device=x.device)
    width = triton.next_power_of_2(columns)
    launch(
        norm_gradients,
        (programs,),
        x,
        weight,
        statistics[0],
        statistics[-1],
        dy,
        added[0] if added else dy,
        dx,
        sums,
        amaxes,
        num_rows,
        columns,
        reads=[x, weight, *statistics, dy, *added],
        writes=[dx, sums, amaxes],
        IS_CENTERED=bias is not None,
        ADDS=bool(added),
        WIDTH=max(width, TOGETHER.value),
        num_warps=_warps(width),
    )
    of_parameters = add_over_programs(sums, weight.dtype)
    return (dx, *of_parameters.unbind()), amaxes


def _rows_of(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return x.numel() // columns, columns


def _warps(width: int) -> int:
    return min(16, max(1, width // 256))


@triton.jit
def normalize(
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
    WIDTH: tl.constexpr,
):
    """The kernel of `norm`."""
    columns = tl.arange(0, WIDTH)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if IS_CENTERED:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.zeros((WIDTH // TOGETHER,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, num_rows, step):
        place = row * num_columns + columns
        loaded = tl.load(x_ptr + place, mask=inside, other=0.0)
        x = loaded.to(tl.float32)
        if IS_CENTERED:
            mean = tl.sum(x, axis=0) / num_columns
            tl.store(mean_ptr + row, mean)
            x = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(x * x, axis=0) / num_columns
        rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))
        tl.store(rstd_ptr + row, rstd)
        y = x * rstd * weight
        if IS_CENTERED:
            y += bias
        y = y.to(loaded.dtype)
        tl.store(y_ptr + place, y, mask=inside)
        largest = larger(largest, y, inside)
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def norm_gradients(
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dy_ptr,
    residual_ptr,
    dx_ptr,
    sum_ptr,
    amax_ptr,
    num_rows,
    num_columns,
    IS_CENTERED: tl.constexpr,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The kernel of `norm_backward`; sums are of weight and bias, [2 (or 1), programs, C]."""
    columns = tl.arange(0, WIDTH)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    largest = tl.zeros((WIDTH // TOGETHER,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, num_rows, step):
        place = row * num_columns + columns
        rstd = tl.load(rstd_ptr + row)
        x = normalized(x_ptr + place, mean_ptr + row, rstd, inside, IS_CENTERED)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += dy * x
        g = dy * weight
        dx = g - x * (tl.sum(g * x, axis=0) / num_columns)
        if IS_CENTERED:
            d_bias += dy
            dx -= tl.sum(g, axis=0) / num_columns
        dx = store_gradient(dx_ptr + place, dx * rstd, residual_ptr + place, inside, ADDS)
        largest = larger(largest, dx, inside)
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))
    store_sums(sum_ptr, columns, d_weight, d_bias, num_columns, IS_CENTERED)


@triton.jit
def normalized(x_ptr, mean_ptr, rstd, inside, IS_CENTERED: tl.constexpr):
    """Numbers of a row in fp32, less its mean if they are centered, over its deviation."""
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    if IS_CENTERED:
        x = tl.where(inside, x - tl.load(mean_ptr), 0.0)
    return x * rstd


@triton.jit
def store_gradient(dx_ptr, dx, residual_ptr, inside, ADDS: tl.constexpr):
    """Write `dx` in its dtype, and return that: with the gradient from elsewhere if it `ADDS`."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    if ADDS:
        added = tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
        dx = (dx.to(tl.float32) + added).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr, dx, mask=inside)
    return dx


@triton.jit
def store_sums(sum_ptr, columns, d_weight, d_bias, num_columns, IS_CENTERED: tl.constexpr):
    """Write a program's sums over its rows for `columns`; [2 (or 1), programs, C]."""
    inside = columns < num_columns
    sum_ptr += tl.program_id(0).to(tl.int64) * num_columns
    tl.store(sum_ptr + columns, d_weight, mask=inside)
    if IS_CENTERED:
        sum_ptr += tl.num_programs(0).to(tl.int64) * num_columns
        tl.store(sum_ptr + columns, d_bias, mask=inside)


@triton.jit
def larger(largest, values, inside):
    """Bits of the larger of `largest` and |`values`|, for what each thread holds."""
    bits = tl.where(inside, magnitude(values.to(tl.float32)), 0)
    bits = tl.reshape(bits, (bits.shape[0] // TOGETHER, TOGETHER))
    return tl.maximum(largest, tl.max(bits, axis=1))
