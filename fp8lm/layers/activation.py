"""Activations of the feed-forward block, as prologues of its second linear layer.

GELU      y = 0.5 x (1 + erf(x / sqrt(2)))                           [.., F] -> [.., F]
  tanh    y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
SwiGLU    y = silu(gate) * up,  x = [gate | up]                     [.., 2F] -> [.., F]
"""

from __future__ import annotations

from torch import Tensor

from fp8lm.kernels.interface import Kernels


class Gelu:
    """GELU of bf16 or fp32; `approximate` as in PyTorch: "tanh" (Megatron's) or "none"."""

    differentiated: tuple[Tensor, ...] = ()

    def __init__(self, kernels: Kernels, approximate: str = "tanh") -> None:
        self.kernels = kernels
        self.approximate = approximate

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        return self.kernels.gelu(x, self.approximate), (x,)

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        (x,) = saved
        dx = self.kernels.gelu_backward(x, dy, self.approximate)
        return (dx if residual is None else dx + residual,)


class SwiGlu:
    """`silu(gate) * up`, of which only the input is kept."""

    differentiated: tuple[Tensor, ...] = ()

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        return self.kernels.swiglu(x), (x,)

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        (x,) = saved
        dx = self.kernels.swiglu_backward(x, dy)
        return (dx if residual is None else dx + residual,)
