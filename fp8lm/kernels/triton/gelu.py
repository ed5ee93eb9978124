"""GELU in both forms, one launch each way, with the amax of the result.

"tanh": 0.5 (1 + tanh(u)) is the logistic function of 2 u, whose exponential keeps its relative
precision where the sum cancels: for negative x the values are closer to the exact ones than
PyTorch's, which are off by up to |x| 2^-24. GELU of Inf and of NaN is the same.
"none": 0.5 (1 + erf(x / sqrt(2))), with the cancellation that PyTorch's has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import num_parts
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import magnitude

_BLOCK = 4096
_WARPS = 8
_TWICE_ROOT = tl.constexpr(2.0 * 0.7978845608028654)  # 2 sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


def gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """See `Kernels.gelu`; and the maxima of parts of the result (see `amax`)."""
    x = x.contiguous()
    y, amaxes = torch.empty_like(x), _amaxes(x)
    launch(
        gelu_values,
        (len(amaxes),),
        x,
        y,
        amaxes,
        x.numel(),
        reads=[x],
        writes=[y, amaxes],
        IS_TANH=approximate == "tanh",
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return y, amaxes


def gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """See `Kernels.gelu_backward`; and the maxima of parts of the result."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, amaxes = torch.empty_like(x), _amaxes(x)
    launch(
        gelu_gradients,
        (len(amaxes),),
        x,
        dy,
        dx,
        amaxes,
        x.numel(),
        reads=[x, dy],
        writes=[dx, amaxes],
        IS_TANH=approximate == "tanh",
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return dx, amaxes


def _amaxes(x: Tensor) -> Tensor:
    return torch.empty(num_parts(x.numel(), _BLOCK), dtype=torch.int32, device=x.device)


@triton.jit
def gelu_values(x_ptr, y_ptr, amax_ptr, numel, IS_TANH: tl.constexpr, BLOCK: tl.constexpr):
    """The kernel of `gelu`."""
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        inside = start + offsets < numel
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0)
        value = x.to(tl.float32)
        y = (value * _cdf(value, IS_TANH)).to(x.dtype)
        tl.store(y_ptr + start + offsets, y, mask=inside)
        largest = tl.maximum(largest, magnitude(y.to(tl.float32)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def gelu_gradients(
    x_ptr, dy_ptr, dx_ptr, amax_ptr, numel, IS_TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """The kernel of `gelu_backward`."""
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        inside = start + offsets < numel
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        value = x.to(tl.float32)
        cdf = _cdf(value, IS_TANH)
        if IS_TANH:
            slope = _TWICE_ROOT * (1.0 + 3.0 * _CUBE * value * value)
            density = (cdf * (1.0 - cdf)) * slope
        else:
            density = _DENSITY * tl.exp(-0.5 * value * value)
        dx = (dy * (cdf + value * density)).to(x.dtype)
        tl.store(dx_ptr + start + offsets, dx, mask=inside)
        largest = tl.maximum(largest, magnitude(dx.to(tl.float32)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _cdf(x, IS_TANH: tl.constexpr):
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), or 0.5 (1 + erf(x / sqrt(2)))."""
    if IS_TANH:
        exponent = -_TWICE_ROOT * (x + _CUBE * x * x * x)
        cdf = 1.0 / (1.0 + tl.exp(exponent))
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF))
    return cdf
