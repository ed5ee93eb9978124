"""SwiGLU, `silu(gate) * up` of x = [gate | up], one launch each way, with the amax of the result.

Rounded wherever eager PyTorch rounds. Only the exponentials differ from PyTorch's, relatively by
(2 + |x|) 2^-23 at most; in bf16 this can move a rounding to the next number, at most twice.

Shapes: T tokens, F features of the gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import magnitude

_BLOCK = 1024


def swiglu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.swiglu`; and the maxima of parts of the result (see `amax`)."""
    x = x.contiguous()
    features = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], features)
    num_tokens = y.numel() // features
    grid, amaxes = _grid(num_tokens, features, x.device)
    launch(
        gated,
        grid,
        x,
        y,
        amaxes,
        num_tokens,
        features,
        reads=[x],
        writes=[y, amaxes],
        BLOCK=_BLOCK,
    )
    return y, amaxes


def swiglu_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.swiglu_backward`; and the maxima of parts of the result."""
    x, dy = x.contiguous(), dy.contiguous()
    features = dy.shape[-1]
    dx = x.new_empty(x.shape)
    num_tokens = dy.numel() // features
    grid, amaxes = _grid(num_tokens, features, x.device)
    launch(
        gated_gradients,
        grid,
        x,
        dy,
        dx,
        amaxes,
        num_tokens,
        features,
        reads=[x, dy],
        writes=[dx, amaxes],
        BLOCK=_BLOCK,
    )
    return dx, amaxes


def _grid(num_tokens: int, features: int, device: torch.device) -> tuple[tuple[int, int], Tensor]:
    """Programs over tokens and blocks of features, each of which leaves an amax."""
    blocks = triton.cdiv(features, _BLOCK)
    over_tokens = max(1, min(num_tokens, MAX_PARTS // blocks))
    return (over_tokens, blocks), torch.empty(
        over_tokens * blocks, dtype=torch.int32, device=device
    )


@triton.jit
def gated(x_ptr, y_ptr, amax_ptr, num_tokens, features, BLOCK: tl.constexpr):
    """The kernel of `swiglu`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    largest = tl.zeros((BLOCK,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for token in range(first, num_tokens, step):
        gate_ptr = x_ptr + token * 2 * features + columns
        gate = tl.load(gate_ptr, mask=inside, other=0.0)
        up = tl.load(gate_ptr + features, mask=inside, other=0.0)
        y = (_silu(gate).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
        tl.store(y_ptr + token * features + columns, y, mask=inside)
        largest = tl.maximum(largest, magnitude(y.to(tl.float32)))
    _leave(amax_ptr, largest)


@triton.jit
def gated_gradients(x_ptr, dy_ptr, dx_ptr, amax_ptr, num_tokens, features, BLOCK: tl.constexpr):
    """The kernel of `swiglu_backward`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    largest = tl.zeros((BLOCK,), tl.int32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for token in range(first, num_tokens, step):
        of_gate = token * 2 * features + columns
        gate = tl.load(x_ptr + of_gate, mask=inside, other=0.0)
        up = tl.load(x_ptr + of_gate + features, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token * features + columns, mask=inside, other=0.0).to(tl.float32)
        d_silu = (dy * up).to(gate.dtype).to(tl.float32)
        value = gate.to(tl.float32)
        sigmoid = tl.math.div_rn(tl.full(value.shape, 1.0, tl.float32), 1.0 + tl.exp(-value))
        d_gate = (d_silu * sigmoid * (1.0 + value * (1.0 - sigmoid))).to(gate.dtype)
        d_up = (dy * _silu(gate).to(tl.float32)).to(gate.dtype)
        tl.store(dx_ptr + of_gate, d_gate, mask=inside)
        tl.store(dx_ptr + of_gate + features, d_up, mask=inside)
        largest = tl.maximum(largest, magnitude(d_gate.to(tl.float32)))
        largest = tl.maximum(largest, magnitude(d_up.to(tl.float32)))
    _leave(amax_ptr, largest)


@triton.jit
def _leave(amax_ptr, largest):
    """Store the amax of a program."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(amax_ptr + program, tl.max(largest, axis=0))


@triton.jit
def _silu(gate):
    """In the dtype of `gate`."""
    value = gate.to(tl.float32)
    return tl.math.div_rn(value, 1.0 + tl.exp(-value)).to(gate.dtype)
