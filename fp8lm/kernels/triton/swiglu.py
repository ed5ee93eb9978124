"""SwiGLU, `silu(gate) * up` of x = [gate | up], in one launch each way.

Rounded wherever eager PyTorch rounds. Only the exponentials differ from PyTorch's, relatively by
(2 + |x|) 2^-23 at most; in bf16 this can move a rounding to the next number, at most twice.

Shapes: T tokens, F features of the gate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch

_BLOCK = 1024


def swiglu(x: Tensor) -> Tensor:
    """See `Kernels`."""
    x = x.contiguous()
    features = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], features)
    launch(
        gated,
        _grid(y, features),
        x,
        y,
        features,
        reads=[x],
        writes=[y],
        BLOCK=_BLOCK,
    )
    return y


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """See `Kernels`."""
    x, dy = x.contiguous(), dy.contiguous()
    features = dy.shape[-1]
    dx = x.new_empty(x.shape)
    launch(
        gated_gradients,
        _grid(dy, features),
        x,
        dy,
        dx,
        features,
        reads=[x, dy],
        writes=[dx],
        BLOCK=_BLOCK,
    )
    return dx


def _grid(y: Tensor, features: int) -> tuple[int, int]:
    return y.numel() // features, triton.cdiv(features, _BLOCK)


@triton.jit
def gated(x_ptr, y_ptr, features, BLOCK: tl.constexpr):
    """The kernel of `swiglu`."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    gate_ptr = x_ptr + token * 2 * features + columns
    gate, up = tl.load(gate_ptr, mask=inside), tl.load(gate_ptr + features, mask=inside)
    y = _silu(gate).to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + token * features + columns, y.to(gate.dtype), mask=inside)


@triton.jit
def gated_gradients(x_ptr, dy_ptr, dx_ptr, features, BLOCK: tl.constexpr):
    """The kernel of `swiglu_backward`."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    of_gate = token * 2 * features + columns
    gate = tl.load(x_ptr + of_gate, mask=inside)
    up = tl.load(x_ptr + of_gate + features, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + token * features + columns, mask=inside).to(tl.float32)
    d_silu = (dy * up).to(gate.dtype).to(tl.float32)
    value = gate.to(tl.float32)
    sigmoid = tl.math.div_rn(tl.full(value.shape, 1.0, tl.float32), 1.0 + tl.exp(-value))
    d_gate = d_silu * sigmoid * (1.0 + value * (1.0 - sigmoid))
    d_up = dy * _silu(gate).to(tl.float32)
    tl.store(dx_ptr + of_gate, d_gate.to(gate.dtype), mask=inside)
    tl.store(dx_ptr + of_gate + features, d_up.to(gate.dtype), mask=inside)


@triton.jit
def _silu(gate):
    """In the dtype of `gate`."""
    value = gate.to(tl.float32)
    return tl.math.div_rn(value, 1.0 + tl.exp(-value)).to(gate.dtype)
