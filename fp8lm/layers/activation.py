"""Activations of the feed-forward block, as prologues of its second linear layer.

GELU      y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        [.., F] -> [.., F]
SwiGLU    y = silu(gate) * up,  x = [gate | up]                     [.., 2F] -> [.., F]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Gelu:
    """GELU in its tanh form (Megatron's), of bf16 or fp32."""

    differentiated: tuple[Tensor, ...] = ()

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        return functional.gelu(x, approximate="tanh"), (x,)

    def backward_from(self, saved: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        return (torch.ops.aten.gelu_backward(dy, *saved, approximate="tanh"),)


class SwiGlu:
    """`silu(gate) * up`; only the input is kept, and silu(gate) is computed again."""

    differentiated: tuple[Tensor, ...] = ()

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up, (x,)

    def backward_from(self, saved: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        gate, up = saved[0].chunk(2, dim=-1)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return (torch.cat((d_gate, dy * functional.silu(gate)), dim=-1),)
