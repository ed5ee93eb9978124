"""A linear layer as three low-precision GEMMs.

    forward   y[T,O]  = x8[T,I]    @ w8[O,I]^T      E4M3 x E4M3, fast accumulation allowed
    dgrad     dx[T,I] = dy8[T,O]   @ w8^T[I,O]^T    E5M2 x E4M3, split accumulation
    wgrad     dw[O,I] = dy8^T[O,T] @ x8^T[I,T]^T    E5M2 x E4M3, split accumulation

x and dy are scaled just in time by their own amax. Saved for backward is x8^T, which wgrad reads,
one byte per element; a column-parallel layer under sequence parallelism saves its part of x8 and
gathers the rest again in backward. dw goes to
the weight's accumulator inside backward; autograd never sees an FP8 edge, where it would cast
gradients to FP8 without a scale. (FP8-LM, arXiv 2310.18313, section 2.)

Shapes: T tokens (all leading dimensions of the input), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam
from fp8lm.layers.prologue import Prologue
from fp8lm.layers.quantizer import Quantizer, TensorKind
from fp8lm.layers.recipe import GemmPrecision, Recipe
from fp8lm.layers.tp_context import TPComm
from fp8lm.numerics import FP32
from fp8lm.scaled_tensor import ScaledTensor


class Linear(nn.Module):
    """`y = x W^T + b` for x of shape [..., in_features]; weight stored [out_features, in_features].

    Input and output are of `recipe.gemm.output` dtype. In FP8 the sizes and the number of tokens
    must be divisible by 16 (ValueError otherwise), as the tensor cores demand. `input_comm` and
    `output_comm` are the communication with other ranks (see `fp8lm.layers.tp_context`).
    """

    def __init__(
        self,
        weight: ParamSpec,
        recipe: Recipe,
        *,
        bias: ParamSpec | None = None,
        input_comm: TPComm | None = None,
        output_comm: TPComm | None = None,
    ) -> None:
        super().__init__()
        kernels, device = recipe.kernels, recipe.device
        self.weight = QuantizedParam(
            weight,
            kernels,
            device,
            recipe.weight_quantizer(),
            cache_operands=recipe.cache_weight_operands,
        )
        self.bias = None if bias is None else VectorParam(bias, kernels, device)
        self.path = GemmPath(recipe.gemm, kernels, input_comm, output_comm)

    @property
    def quantizers(self) -> dict[TensorKind, Quantizer]:
        """The quantizers of this layer, by the kind of tensor."""
        return {**self.path.quantizers, "weight": self.weight.quantizer}

    def forward(self, x: Tensor, prologue: Prologue | None = None) -> Tensor:
        """[..., I] -> [..., O], this rank's tokens and features; `prologue` is applied first."""
        bias = None if self.bias is None else self.bias.param
        return linear(x, self.weight, self.path, bias, prologue)


class GemmPath:
    """How the operands of a layer's GEMMs are cast, sent and received."""

    def __init__(
        self,
        precision: GemmPrecision,
        kernels: Kernels,
        input_comm: TPComm | None = None,
        output_comm: TPComm | None = None,
    ) -> None:
        self.precision = precision
        self.kernels = kernels
        self.input_comm, self.output_comm = input_comm or TPComm(), output_comm or TPComm()
        self.input = Quantizer(precision.input, kernels)
        self.grad_output = Quantizer(precision.grad_output, kernels)
        dtype = precision.output
        self.sent_input = self.input_comm.wire_quantizer(self.input, dtype)
        self.sent_grad_output = self.output_comm.wire_quantizer(self.grad_output, dtype)

    @property
    def quantizers(self) -> dict[TensorKind, Quantizer]:
        """The quantizers of the GEMMs' operands: before communication (wire) or after it."""
        sent = {"input": self.sent_input, "grad_output": self.sent_grad_output}
        operands: dict[TensorKind, Quantizer]
        operands = {"input": self.input, "grad_output": self.grad_output}
        return {
            kind: sent[kind] if sent[kind].format == operand.format else operand
            for kind, operand in operands.items()
        }

    def cast_input(
        self, x: Tensor, *, transposed: bool
    ) -> tuple[ScaledTensor, ScaledTensor | None]:
        """`x` [T,I] as it is sent to other ranks; and `transposed`, unless others hold a part."""
        return _cast(x, self.sent_input, self.input_comm, transposed)

    def cast_grad_output(
        self, dy: Tensor, *, transposed: bool
    ) -> tuple[ScaledTensor, ScaledTensor | None]:
        """The same of `dy` [T,O]."""
        return _cast(dy, self.sent_grad_output, self.output_comm, transposed)

    def operand(self, gathered: ScaledTensor, quantizer: Quantizer) -> ScaledTensor:
        """`gathered` in the format of its GEMM."""
        if gathered.format == quantizer.format:
            return gathered
        # FP8 and BF16 values are exact in bf16.
        exact = torch.float32 if gathered.format == FP32 else torch.bfloat16
        return quantizer(self.kernels.dequantize(gathered, exact))


def _cast(
    x: Tensor, quantizer: Quantizer, comm: TPComm, transposed: bool
) -> tuple[ScaledTensor, ScaledTensor | None]:
    if transposed and not comm.gathers:
        return quantizer.with_transpose(x)
    return quantizer(x), None


def linear(
    x: Tensor,
    weight: QuantizedParam,
    path: GemmPath,
    bias: Tensor | None = None,
    prologue: Prologue | None = None,
) -> Tensor:
    """`x W^T + b`; the gradient of `weight` is added to its `main_grad`. See the module.

    `path` gathers and scatters the first dimension of `x`. With `prologue` f it is `f(x) W^T + b`.
    """
    parameters = () if prologue is None else prologue.differentiated
    proxy = weight.autograd_proxy
    return _LinearFunction.apply(x, proxy, bias, weight, path, prologue, *parameters)


_NUM_INPUTS = 6  # of the function below, before the parameters of its prologue


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        autograd_proxy: Tensor,
        bias: Tensor | None,
        weight: QuantizedParam,
        path: GemmPath,
        prologue: Prologue | None,
        *parameters: Tensor,
    ) -> Tensor:
        kernels, reduces = path.kernels, path.output_comm.reduces
        y, of_prologue = (x, ()) if prologue is None else prologue.forward_saving(x)
        trainable = weight.spec.trainable
        sent, x_IT = path.cast_input(y.reshape(-1, y.shape[-1]), transposed=trainable)
        gathering = path.input_comm.gather(sent)
        w_OI = weight.operand()
        x_TI = path.operand(gathering.wait(), path.input)
        y_TO = kernels.gemm(
            x_TI,
            w_OI,
            bias=None if reduces else bias,
            out_dtype=path.precision.output,
            fast_accumulation=True,
        )
        y_TO = path.output_comm.reduce(y_TO).wait()
        if bias is not None and reduces:
            y_TO.add_(bias)
        saved: tuple[Tensor | None, ...] = ()
        if trainable:
            own = sent if x_IT is None else x_IT  # this rank's part, or the whole
            saved = (own.payload, own.scale, own.inverse)
            ctx.saved_as = (own.format, own.granularity)
        ctx.save_for_backward(*saved, *of_prologue)
        ctx.weight, ctx.path, ctx.prologue, ctx.input_shape = weight, path, prologue, y.shape
        # Of the leading dimensions only the first can have changed.
        return y_TO.view(-1, *x.shape[1:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, path, kernels = ctx.weight, ctx.path, ctx.path.kernels
        input_comm, dtype = path.input_comm, path.precision.output
        dy = dy.reshape(-1, dy.shape[-1])
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        sent, dy_OT = path.cast_grad_output(dy, transposed=weight.spec.trainable)
        dy_TO = path.operand(path.output_comm.gather(sent).wait(), path.grad_output)
        # The inputs are gathered while dgrad runs, its result is reduced while wgrad runs.
        wgrad, of_prologue = None, ctx.saved_tensors  # once: with recomputation it recomputes
        if weight.spec.trainable:
            payload, scale, inverse, *of_prologue = of_prologue
            fmt, granularity = ctx.saved_as
            saved = ScaledTensor(payload, scale, fmt, granularity, inverse)
            dy_OT = kernels.transpose(dy_TO) if dy_OT is None else dy_OT
            wgrad = _weight_gradient(weight, path, saved, dy_OT)
        reducing = None
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[_NUM_INPUTS:]):
            dx_TI = kernels.gemm(dy_TO, weight.transposed_operand(), out_dtype=dtype)
            reducing = input_comm.reduce(dx_TI)
        if wgrad is not None:
            weight.wgrad_store.add(wgrad)
        dx = None if reducing is None else reducing.wait().view(ctx.input_shape)
        # Gradients of the input and of the prologue's parameters, which may all be frozen.
        gradients: tuple[Tensor | None, ...] = (dx,)
        if ctx.prologue is not None:
            gradients = (None,) * (1 + len(ctx.needs_input_grad) - _NUM_INPUTS)
            if dx is not None:
                gradients = ctx.prologue.backward_from(tuple(of_prologue), dx)
        return gradients[0], None, db, None, None, None, *gradients[1:]


def _weight_gradient(
    weight: QuantizedParam, path: GemmPath, saved: ScaledTensor, dy_OT: ScaledTensor
) -> Callable[[], None]:
    """A function that computes and adds the weight's gradient; starts gathering the `saved` inputs.

    A deferred wgrad gathers its input when it runs: until then a rank holds only its part.
    """
    kernels, comm = path.kernels, path.input_comm
    gathering = None
    if comm.gathers and not weight.wgrad_store.is_deferring:
        gathering = comm.gather(saved)

    def compute() -> None:
        x_IT = saved
        if comm.gathers:
            arriving = gathering or comm.gather(saved)
            x_IT = kernels.transpose(path.operand(arriving.wait(), path.input))
        dw_OI = kernels.gemm(dy_OT, x_IT, out_dtype=path.precision.output)
        weight.main_grad.add(dw_OI)

    return compute
