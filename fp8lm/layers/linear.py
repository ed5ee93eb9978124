"""A linear layer as three low-precision GEMMs.

    forward   y[T,O]  = x8[T,I]    @ w8[O,I]^T      E4M3 x E4M3, fast accumulation allowed
    dgrad     dx[T,I] = dy8[T,O]   @ w8^T[I,O]^T    E5M2 x E4M3, split accumulation
    wgrad     dw[O,I] = dy8^T[O,T] @ x8^T[I,T]^T    E5M2 x E4M3, split accumulation

x and dy are scaled just in time by their own amax. Saved for backward is x8^T, which wgrad reads,
one byte per element; a column-parallel layer under sequence parallelism saves its part of x8 and
gathers the rest again in backward. dw goes to
the weight's accumulator inside backward; autograd never sees an FP8 edge, where it would cast
gradients to FP8 without a scale. (FP8-LM, arXiv 2310.18313, section 2.)

With scales per row or block, x8 and x8^T are two tensors, both cast from x in forward: every GEMM
has scales along its own contraction. x8^T alone is saved, so that memory is the same but for its
scales, 4 bytes each.

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
from fp8lm.layers.recipe import BF16_GEMM, GemmPrecision, Recipe
from fp8lm.layers.smoothing import channel_scales
from fp8lm.layers.tp_context import TPComm
from fp8lm.numerics import BF16, FP32
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
        smooth: bool = False,
    ) -> None:
        super().__init__()
        kernels, device = recipe.kernels, recipe.device
        self.weight = QuantizedParam(
            weight,
            kernels,
            device,
            recipe.weight_quantizer(weight.shape, weight.shard_spec),
            cache_operands=recipe.cache_weight_operands,
        )
        self.bias = None if bias is None else VectorParam(bias, kernels, device)
        smooth = smooth and recipe.gemm.input.scaled
        self.path = GemmPath(recipe.gemm, kernels, input_comm, output_comm, smooth=smooth)
        # Of the recipe, while other ones are used.
        self._set_aside: tuple[GemmPath, Quantizer] | None = None

    @property
    def quantizers(self) -> dict[TensorKind, Quantizer]:
        """The quantizers of this layer, by the kind of tensor."""
        return {**self.path.quantizers, "weight": self.weight.quantizer}

    @property
    def recipe_quantizers(self) -> dict[TensorKind, Quantizer]:
        """Those of the recipe, which are not in use after `fall_back`."""
        if self._set_aside is None:
            return self.quantizers
        path, of_weight = self._set_aside
        return {**path.quantizers, "weight": of_weight}

    def fall_back(self) -> None:
        """Run the GEMMs in BF16 from the next forward on, and gather their operands in BF16.

        The stored weight and the partial sums keep their formats. Between steps, on all ranks.
        """
        if self._set_aside is None:
            self._set_aside = self.path, self.weight.quantizer
            self.path = self.path.in_bf16()
            self.weight.quantizer = Quantizer(BF16, self.path.kernels)

    def restore(self) -> None:
        """Return to the recipe's formats."""
        if self._set_aside is not None:
            self.path, self.weight.quantizer = self._set_aside
            self._set_aside = None

    def forward(
        self, x: Tensor, prologue: Prologue | None = None, *, with_residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[..., I] -> [..., O], this rank's tokens and features; `prologue` is applied first.

        `with_residual`: see there.
        """
        bias = None if self.bias is None else self.bias.param
        y, residual = linear_with_residual(x, self.weight, self.path, bias, prologue)
        return (y, residual) if with_residual else y

    def with_residual(self, x: Tensor, prologue: Prologue | None = None) -> tuple[Tensor, Tensor]:
        """`forward`, and `x` for the path around the layer.

        The gradient that comes back on that path is added where the prologue's is computed.
        """
        # A call of the module: its hooks wait for weights that still travel.
        return self(x, prologue, with_residual=True)


class OperandPath:
    """How a tensor of two GEMMs is cast, sent and received: an input or an output gradient.

    The first GEMM reads it as it is, [T,F], wgrad its transposed. `comm` gathers the tokens, in
    the format that its wire has for them or, with `exact_wire`, in that of the GEMMs.
    """

    def __init__(
        self, quantizer: Quantizer, comm: TPComm, dtype: torch.dtype, *, exact_wire: bool = False
    ) -> None:
        self.kernels = quantizer.kernels
        self.quantizer = quantizer
        self.comm = comm
        self.sent = quantizer if exact_wire else comm.wire_quantizer(quantizer, dtype)

    @property
    def cast_by(self) -> Quantizer:
        """The quantizer of the GEMMs' operand: before communication (wire) or after it."""
        return self.sent if self.sent.format == self.quantizer.format else self.quantizer

    def cast(
        self, x: Tensor, *, wgrad: bool, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """`x` [T,F] as it is sent to other ranks for the first GEMM, and with `wgrad` for that.

        The second is wgrad's operand where nothing is gathered, else what to gather for it. `sums`:
        the sums of the columns of `x` are wanted next (`Kernels.column_sums`).
        """
        if wgrad and not self.comm.gathers:
            return self.sent.with_transpose(x, sums=sums)
        sent = self.sent(x)
        if wgrad and not self.sent.granularity.is_symmetric:
            return sent, self.sent.along_columns(x)
        return sent, sent

    def operand(self, gathered: ScaledTensor) -> ScaledTensor:
        """`gathered` as the first GEMM reads it."""
        if gathered.format == self.quantizer.format:
            return gathered
        return self.quantizer(self._values(gathered))

    def transposed_operand(self, gathered: ScaledTensor) -> ScaledTensor:
        """`gathered` (the second result of `cast`) as wgrad reads it."""
        if gathered.format == self.quantizer.format:
            return self.kernels.transpose(gathered)
        return self.quantizer.transposed(self._values(gathered))

    def both(
        self, x: Tensor, *, wgrad: bool, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor | None]:
        """`x` [T,F] of this rank as the first GEMM reads it and, if asked for, as wgrad does.

        `sums`: see `cast`.
        """
        sent, second = self.cast(x, wgrad=wgrad, sums=sums)
        if not self.comm.gathers:
            return self.operand(sent), second
        gathered = self.comm.gather(sent).wait()
        if not wgrad:
            return self.operand(gathered), None
        if second is not sent:
            return gathered, self.transposed_operand(self.comm.gather(second).wait())
        if gathered.format == self.quantizer.format:
            return gathered, self.kernels.transpose(gathered)
        return self.quantizer.with_transpose(self._values(gathered))

    def _values(self, gathered: ScaledTensor) -> Tensor:
        # FP8 and BF16 values are exact in bf16.
        exact = torch.float32 if gathered.format == FP32 else torch.bfloat16
        return self.kernels.dequantize(gathered, exact)


class GemmPath:
    """How the operands of a layer's GEMMs are cast, sent and received.

    With `exact_wires` they are sent as the GEMMs read them, whatever the wires carry. `smooth`: the
    input, which no other rank has a part of, is smoothed (see `fp8lm.layers.smoothing`).
    """

    def __init__(
        self,
        precision: GemmPrecision,
        kernels: Kernels,
        input_comm: TPComm | None = None,
        output_comm: TPComm | None = None,
        *,
        exact_wires: bool = False,
        smooth: bool = False,
    ) -> None:
        self.precision = precision
        self.smooth = smooth
        self.kernels = kernels
        self.input_comm, self.output_comm = input_comm or TPComm(), output_comm or TPComm()
        scaling, dtype = precision.scaling, precision.output
        of_input = Quantizer(
            precision.input,
            kernels,
            granularity=scaling.input,
            known_scale=scaling.known_scale(),
        )
        of_gradient = Quantizer(
            precision.grad_output,
            kernels,
            granularity=scaling.grad_output,
            known_scale=scaling.known_scale(),
        )
        self.input = OperandPath(of_input, self.input_comm, dtype, exact_wire=exact_wires)
        self.grad_output = OperandPath(of_gradient, self.output_comm, dtype, exact_wire=exact_wires)

    def in_bf16(self) -> GemmPath:
        """The same communication with operands in BF16, also on the wires that gather them."""
        comms = self.input_comm, self.output_comm
        return GemmPath(BF16_GEMM, self.kernels, *comms, exact_wires=True)

    @property
    def quantizers(self) -> dict[TensorKind, Quantizer]:
        """The quantizers of the GEMMs' operands."""
        return {"input": self.input.cast_by, "grad_output": self.grad_output.cast_by}


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
    return linear_with_residual(x, weight, path, bias, prologue)[0]


def linear_with_residual(
    x: Tensor,
    weight: QuantizedParam,
    path: GemmPath,
    bias: Tensor | None = None,
    prologue: Prologue | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear`, and `x` for the path around the layer; see `Linear.with_residual`."""
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
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        kernels, reduces = path.kernels, path.output_comm.reduces
        y, of_prologue = (x, ()) if prologue is None else prologue.forward_saving(x)
        trainable = weight.spec.trainable
        y_TI, divisors = y.reshape(-1, y.shape[-1]), None
        if path.smooth:
            scales = channel_scales(y_TI)
            y_TI, divisors = y_TI * scales, scales.reciprocal()
        sent, own = path.input.cast(y_TI, wgrad=trainable)
        gathering = path.input_comm.gather(sent)
        w_OI = weight.operand() if divisors is None else weight.operand_of_columns(divisors)
        x_TI = path.input.operand(gathering.wait())
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
        if trainable:  # wgrad's operand, or this rank's part of it
            saved = (own.payload, own.scale, own.inverse, divisors)
            ctx.saved_as = (own.format, own.granularity)
        ctx.save_for_backward(*saved, *of_prologue)
        ctx.weight, ctx.path, ctx.prologue, ctx.input_shape = weight, path, prologue, y.shape
        # Of the leading dimensions only the first can have changed.
        return y_TO.view(-1, *x.shape[1:-1], y_TO.shape[-1]), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, path, kernels = ctx.weight, ctx.path, ctx.path.kernels
        input_comm, dtype = path.input_comm, path.precision.output
        dy, has_bias = dy.reshape(-1, dy.shape[-1]), ctx.needs_input_grad[2]
        dy_TO, dy_OT = path.grad_output.both(dy, wgrad=weight.spec.trainable, sums=has_bias)
        db = kernels.column_sums(dy) if has_bias else None
        # The inputs are gathered while dgrad runs, its result is reduced while wgrad runs.
        wgrad, of_prologue = None, ctx.saved_tensors  # once: with recomputation it recomputes
        if dy_OT is not None and weight.spec.trainable:
            payload, scale, inverse, divisors, *of_prologue = of_prologue
            fmt, granularity = ctx.saved_as
            saved = ScaledTensor(payload, scale, fmt, granularity, inverse)
            wgrad = _weight_gradient(weight, path, saved, dy_OT, divisors)
        reducing = None
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[_NUM_INPUTS:]):
            dx_TI = kernels.gemm(dy_TO, weight.transposed_operand(), out_dtype=dtype)
            reducing = input_comm.reduce(dx_TI)
        if wgrad is not None:
            weight.wgrad_store.add(wgrad)
        dx = None if reducing is None else reducing.wait().view(ctx.input_shape)
        # Gradients of the input and of the prologue's parameters, which may all be frozen.
        gradients = (None,) * (1 + len(ctx.needs_input_grad) - _NUM_INPUTS)
        if dx is not None and ctx.prologue is not None:
            gradients = ctx.prologue.backward_from(tuple(of_prologue), dx, residual)
        elif dx is not None:
            gradients = (dx if residual is None else dx + residual,)
        return gradients[0], None, db, None, None, None, *gradients[1:]


def _weight_gradient(
    weight: QuantizedParam,
    path: GemmPath,
    saved: ScaledTensor,
    dy_OT: ScaledTensor,
    divisors: Tensor | None,
) -> Callable[[], None]:
    """A function that computes and adds the weight's gradient; starts gathering the `saved` inputs.

    `divisors` multiply its columns, if the input was smoothed.
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
            x_IT = path.input.transposed_operand(arriving.wait())
        dw_OI = kernels.gemm(dy_OT, x_IT, out_dtype=path.precision.output)
        if divisors is not None:
            dw_OI.mul_(divisors)
        weight.main_grad.add(dw_OI)

    return compute
