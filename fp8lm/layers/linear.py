"""A linear layer as three low-precision GEMMs.

    forward   y[T,O]  = x8[T,I]    @ w8[O,I]^T      E4M3 x E4M3, fast accumulation allowed
    dgrad     dx[T,I] = dy8[T,O]   @ w8^T[I,O]^T    E5M2 x E4M3, split accumulation
    wgrad     dw[O,I] = dy8^T[O,T] @ x8^T[I,T]^T    E5M2 x E4M3, split accumulation

x and dy are scaled just in time by their own amax. What is saved for backward is x8, one byte
per element. dw goes to the weight's accumulator inside backward; autograd never sees an FP8 edge,
where it would cast gradients to FP8 without a scale. (FP8-LM, arXiv 2310.18313, section 2.)

Shapes: T tokens (all leading dimensions of the input), I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.weight import GemmWeight, VectorWeight, WeightSpec, vector_spec
from fp8lm.numerics import BF16, E4M3, E5M2, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor, quantize


@dataclass(frozen=True)
class GemmPrecision:
    """Formats of the operands of a linear layer's GEMMs, and the dtype of what they return."""

    input: Format
    weight: Format
    grad_output: Format
    output: torch.dtype


FP8_GEMM = GemmPrecision(E4M3, E4M3, E5M2, torch.bfloat16)
BF16_GEMM = GemmPrecision(BF16, BF16, BF16, torch.bfloat16)
FP32_GEMM = GemmPrecision(FP32, FP32, FP32, torch.float32)


class Linear(nn.Module):
    """`y = x W^T + b` for x of shape [..., in_features]; weight stored [out_features, in_features].

    Input and output are of `precision.output` dtype. In FP8 the sizes and the number of tokens
    must be divisible by 16 (ValueError otherwise), as the tensor cores demand.
    """

    def __init__(
        self,
        weight: WeightSpec,
        *,
        precision: GemmPrecision,
        kernels: ReferenceKernels,
        device: torch.device,
        bias: bool,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.weight = GemmWeight(weight, kernels, device)
        self.bias = None
        if bias:
            bias_format = FP32 if precision.output == torch.float32 else BF16
            self.bias = VectorWeight(
                vector_spec(weight.shape[0], 0.0, bias_format), kernels, device
            )

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        bias = None if self.bias is None else self.bias.data
        return linear(x, self.weight, self.precision, bias)


def linear(
    x: Tensor, weight: GemmWeight, precision: GemmPrecision, bias: Tensor | None = None
) -> Tensor:
    """`x W^T + b` with `weight`'s gradient going to `weight.grad`; see the module's arithmetic."""
    return _LinearFunction.apply(x, weight.anchor, bias, weight, precision)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        bias: Tensor | None,
        weight: GemmWeight,
        precision: GemmPrecision,
    ) -> Tensor:
        kernels = weight.kernels
        x_TI = quantize(x.reshape(-1, x.shape[-1]), precision.input, kernels)
        w_OI = weight.operand(precision.weight)
        y_TO = kernels.gemm(
            x_TI.operand, w_OI.operand, out_dtype=precision.output, fast_accumulation=True
        )
        if bias is not None:
            y_TO.add_(bias)
        ctx.save_for_backward(x_TI.payload, x_TI.scale)
        ctx.weight, ctx.precision, ctx.input_shape = weight, precision, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        weight, precision = ctx.weight, ctx.precision
        kernels, dtype = weight.kernels, precision.output
        dy = dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        dy_TO = quantize(dy, precision.grad_output, kernels)
        dx = None
        if ctx.needs_input_grad[0]:
            w_OI = weight.operand(precision.weight)
            dx_TI = kernels.gemm(dy_TO.operand, w_OI.t().operand, out_dtype=dtype)
            dx = dx_TI.view(ctx.input_shape)
        x_TI = ScaledTensor(*ctx.saved_tensors, precision.input)
        weight.grad.add(kernels.gemm(dy_TO.t().operand, x_TI.t().operand, out_dtype=dtype))
        return dx, None, db, None, None
