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
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam
from fp8lm.layers.tp_context import NO_COMM, TPComm
from fp8lm.numerics import BF16, E4M3, E5M2, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor


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
    must be divisible by 16 (ValueError otherwise), as the tensor cores demand. `input_comm` and
    `output_comm` say what is exchanged with other ranks (see `fp8lm.layers.tp_context`).
    """

    def __init__(
        self,
        weight: ParamSpec,
        *,
        precision: GemmPrecision,
        kernels: ReferenceKernels,
        device: torch.device,
        bias: ParamSpec | None = None,
        input_comm: TPComm | None = None,
        output_comm: TPComm | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.input_comm = input_comm or TPComm()
        self.output_comm = output_comm or TPComm()
        self.weight = QuantizedParam(weight, kernels, device, precision.weight)
        self.bias = None if bias is None else VectorParam(bias, kernels, device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] of this rank's tokens and features."""
        bias = None if self.bias is None else self.bias.param
        comms = self.input_comm, self.output_comm
        return linear(x, self.weight, self.precision, bias, comms)


def linear(
    x: Tensor,
    weight: QuantizedParam,
    precision: GemmPrecision,
    bias: Tensor | None = None,
    comms: tuple[TPComm, TPComm] = NO_COMM,
) -> Tensor:
    """`x W^T + b`; the gradient of `weight` is added to its `main_grad`. See the module.

    `comms` (input, output) gather and scatter the first dimension of `x`.
    """
    return _LinearFunction.apply(x, weight.autograd_proxy, bias, weight, precision, comms)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        autograd_proxy: Tensor,
        bias: Tensor | None,
        weight: QuantizedParam,
        precision: GemmPrecision,
        comms: tuple[TPComm, TPComm],
    ) -> Tensor:
        kernels, (input_comm, output_comm) = weight.kernels, comms
        x_saved = input_comm.cast(x.reshape(-1, x.shape[-1]), precision.input, kernels)
        gathering = input_comm.gather(x_saved, precision.input, kernels)
        w_OI = weight.operand(input_comm.share_amax)
        x_TI = gathering.wait()
        y_TO = kernels.gemm(
            x_TI.operand, w_OI.operand, out_dtype=precision.output, fast_accumulation=True
        )
        y_TO = output_comm.reduce(y_TO, kernels).wait()
        if bias is not None:
            y_TO.add_(bias)
        ctx.save_for_backward(x_saved.payload, x_saved.scale)
        ctx.weight, ctx.precision, ctx.comms = weight, precision, comms
        ctx.saved_format, ctx.input_shape = x_saved.format, x.shape
        # Of the leading dimensions only the first can have changed.
        return y_TO.view(-1, *x.shape[1:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, precision, (input_comm, output_comm) = ctx.weight, ctx.precision, ctx.comms
        kernels, dtype = weight.kernels, precision.output
        dy = dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        sent = output_comm.cast(dy, precision.grad_output, kernels)
        dy_TO = output_comm.gather(sent, precision.grad_output, kernels).wait()
        # The inputs are gathered while dgrad runs, its result is reduced while wgrad runs.
        payload, scale = ctx.saved_tensors
        x_saved = ScaledTensor(payload, scale, ctx.saved_format)
        # A deferred wgrad gathers its input when it runs: until then a rank holds only its part.
        gathering = None
        if not weight.wgrad_store.is_deferring:
            gathering = input_comm.gather(x_saved, precision.input, kernels)
        reducing = None
        if ctx.needs_input_grad[0]:
            w_OI = weight.operand(input_comm.share_amax)
            dx_TI = kernels.gemm(dy_TO.operand, w_OI.t().operand, out_dtype=dtype)
            reducing = input_comm.reduce(dx_TI, kernels)

        def compute_weight_gradient() -> None:
            arriving = gathering or input_comm.gather(x_saved, precision.input, kernels)
            x_TI = arriving.wait()
            dw_OI = kernels.gemm(dy_TO.t().operand, x_TI.t().operand, out_dtype=dtype)
            weight.main_grad.add(dw_OI)

        weight.wgrad_store.add(compute_weight_gradient)
        dx = None if reducing is None else reducing.wait().view(ctx.input_shape)
        return dx, None, db, None, None, None
