"""LayerNorm and RMSNorm; weights in BF16 (or FP32), statistics in fp32 inside the kernels.

Each is a module of its own, and the `Prologue` of the linear layer that reads it; both compute with
the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import VectorParam, vector_spec
from fp8lm.layers.prologue import Prologue
from fp8lm.numerics import Format


class Norm(nn.Module):
    """A normalization over the last dimension with a weight, and a bias where `has_bias`.

    `sequence_parallel`: see `ParamSpec`.
    """

    has_bias: bool

    def __init__(
        self,
        size: int,
        eps: float,
        fmt: Format,
        kernels: Kernels,
        device: torch.device,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        weight = vector_spec(size, 1.0, fmt, sequence_parallel=sequence_parallel)
        self.weight = VectorParam(weight, kernels, device)
        bias = vector_spec(size, 0.0, fmt, sequence_parallel=sequence_parallel)
        self.bias = VectorParam(bias, kernels, device) if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return _apart(x, self)

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """See `Prologue`: the weight, and the bias if there is one."""
        weight, bias = self._weight_and_bias
        return (weight,) if bias is None else (weight, bias)

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        y, statistics = self.kernels.norm(x, *self._weight_and_bias, self.eps)
        return y, (x, *statistics)

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        x, *of_rows = saved
        parameters = self._weight_and_bias
        return self.kernels.norm_backward(x, *parameters, tuple(of_rows), dy, self.eps, residual)

    @property
    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.param, None if self.bias is None else self.bias.param


class LayerNorm(Norm):
    """`(x - mean) / sqrt(var + eps) * weight + bias`."""

    has_bias = True


class RMSNorm(Norm):
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    has_bias = False


def _apart(x: Tensor, norm: Prologue) -> Tensor:
    """`norm` of `x` where no linear layer applies it: before the head, and of queries and keys."""
    return _NormFunction.apply(x, norm, *norm.differentiated)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Prologue, *parameters: Tensor) -> Tensor:
        y, saved = norm.forward_saving(x)
        ctx.norm = norm
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, *of_parameters = ctx.norm.backward_from(ctx.saved_tensors, dy)
        return dx, None, *of_parameters


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
