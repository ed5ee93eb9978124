"""LayerNorm and RMSNorm; weights in BF16 (or FP32), statistics in fp32 inside the kernels.

Each is a module of its own, and the `Prologue` of the linear layer that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import VectorParam, vector_spec
from fp8lm.numerics import Format


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    `sequence_parallel`: see `ParamSpec`.
    """

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
        self.bias = VectorParam(bias, kernels, device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return functional.layer_norm(x, x.shape[-1:], self.weight.param, self.bias.param, self.eps)

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """See `Prologue`: weight and bias."""
        return self.weight.param, self.bias.param

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        y, statistics = self.kernels.norm(x, self.weight.param, self.bias.param, self.eps)
        return y, (x, *statistics)

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        x, *of_rows = saved
        parameters = self.weight.param, self.bias.param
        return self.kernels.norm_backward(x, *parameters, tuple(of_rows), dy, self.eps, residual)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    `sequence_parallel`: see `ParamSpec`.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return functional.rms_norm(x, x.shape[-1:], self.weight.param, self.eps)

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """See `Prologue`: the weight."""
        return (self.weight.param,)

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Prologue`."""
        y, statistics = self.kernels.norm(x, self.weight.param, None, self.eps)
        return y, (x, *statistics)

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See `Prologue`."""
        x, *of_rows = saved
        parameters = self.weight.param, None
        return self.kernels.norm_backward(x, *parameters, tuple(of_rows), dy, self.eps, residual)


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
