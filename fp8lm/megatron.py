"""The FP8 linear layers alone, for models of megatron-core.

    spec = fp8_layer_spec(get_gpt_layer_local_spec())
    TransformerBlock(config, spec) or GPTModel(config, spec, ...)

A layer of a spec whose linear layers are megatron-core's own gets ones that compute as this program
does: three FP8 GEMMs with current scaling, scales that are shared over the tensor-parallel ranks,
and FP8 wires, if they are asked for. Everything else stays Megatron's: parameters in BF16 (or fp32)
and their initial values, gradients through autograd, optimizer, checkpoints. So memory is that of
the preset `te`; what this program saves beyond it needs its own optimizer.

The weight is cast in forward and again, transposed, in backward: no FP8 copy is kept.

Shapes: T tokens (sequence x batch), I input features, O output features, of this rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8lm.comm import Wire, WireCounter
from fp8lm.config import PrecisionConfig
from fp8lm.kernels import select_kernels
from fp8lm.layers.linear import GemmPath
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.parallel.tensor_parallel import TensorParallel
from fp8lm.scaled_tensor import ScaledTensor

DEFAULT = {"preset": "te"}


def fp8_layer_spec(layer: ModuleSpec, precision: Mapping[str, Any] | None = None) -> ModuleSpec:
    """A copy of a transformer layer's spec with FP8 linear layers in the place of Megatron's.

    `precision` has keys of config section `precision` (default: preset `te`): of formats and scales
    of GEMMs, `grad_output_format` and `scaling`, and `wire.gather` and `wire.reduce`. ValueError
    for what is not an FP8 recipe, or needs the state of a training (delayed scaling), and for a
    spec without such layers.
    """
    section = PrecisionConfig.model_validate(DEFAULT if precision is None else dict(precision))
    if section.gemm != "fp8" or section.scaling_method == "delayed" or section.smooth_swiglu:
        raise ValueError(
            "fp8_layer_spec needs FP8 GEMMs with current or static scaling, without Smooth-SwiGLU: "
            f"found precision.gemm = {section.gemm}, scaling_method = {section.scaling_method}, "
            f"smooth_swiglu = {section.smooth_swiglu}"
        )
    spec = copy.deepcopy(layer)
    if not _replace_linears(spec, section):
        raise ValueError(
            "the spec has no ColumnParallelLinear or RowParallelLinear of megatron-core: use one "
            "of local layers, as get_gpt_layer_local_spec makes it"
        )
    return spec


def _replace_linears(spec: ModuleSpec | partial[Any], precision: PrecisionConfig) -> int:
    """Replace the layers in all submodules; how many there were."""
    # Since megatron-core 0.18 an MLP is a function with its submodules bound to it.
    count, submodules = 0, _submodules_of(spec)
    if submodules is None:
        return count
    for field in dataclasses.fields(submodules):
        inner = getattr(submodules, field.name)
        module = inner.module if isinstance(inner, ModuleSpec) else inner
        if isinstance(module, type) and module in _REPLACEMENTS:
            given = inner.params if isinstance(inner, ModuleSpec) else {}
            params = {**given, "precision": precision}
            replaced = ModuleSpec(module=_REPLACEMENTS[module], params=params)
            setattr(submodules, field.name, replaced)
            count += 1
        elif isinstance(inner, ModuleSpec | partial):
            count += _replace_linears(inner, precision)
    return count


def _submodules_of(spec: ModuleSpec | partial[Any]) -> Any:
    given = spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords.get("submodules")
    return given if dataclasses.is_dataclass(given) else None


class Fp8Gemms:
    """How one layer casts its tensors, and what it sends to other ranks; built at its first use.

    `shape` is that of the whole weight, [O,I], of which ranks of `group` have parts along `dim`.
    """

    def __init__(
        self,
        precision: PrecisionConfig,
        shape: tuple[int, int],
        group: torch.distributed.ProcessGroup,
        *,
        sequence_parallel: bool,
        is_column: bool,
        device: torch.device,
    ) -> None:
        kernels = select_kernels(device, precision.kernels)
        tp: TPContext = NO_TP
        if group.size() > 1:
            counter = WireCounter()
            tp = TensorParallel(
                group=group,
                sequence_parallel=sequence_parallel,
                gather_wire=Wire.of_key("gather", precision.wire, counter),
                reduce_wire=Wire.of_key("reduce", precision.wire, counter),
                kernels=kernels,
            )
        recipe = Recipe.from_config(precision, kernels, device, tp)
        # Replicated or sequence-parallel activations on one side, sharded features on the other.
        comms = tp.replicated_side(), tp.sharded_side()
        self.path = GemmPath(recipe.gemm, kernels, *(comms if is_column else comms[::-1]))
        self.weight: Quantizer = recipe.weight_quantizer(shape, tp.shard(0 if is_column else 1))

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x W^T` in the dtype of `x`, over all ranks."""
        return _Fp8LinearFunction.apply(x, weight, self).to(x.dtype)


class _Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gemms: Fp8Gemms) -> Tensor:
        path, kernels = gemms.path, gemms.path.kernels
        sent, own = path.input.cast(x.reshape(-1, x.shape[-1]), wgrad=True)
        gathering = path.input_comm.gather(sent)
        amax = gemms.weight.local_amax(weight)
        if amax is not None and gemms.weight.share_amax is not None:
            amax = gemms.weight.share_amax(amax)
        y_TO = kernels.gemm(
            path.input.operand(gathering.wait()),
            gemms.weight(weight.detach(), amax=amax),
            out_dtype=path.precision.output,
            fast_accumulation=True,
        )
        y_TO = path.output_comm.reduce(y_TO).wait()
        ctx.save_for_backward(own.payload, own.scale, own.inverse, weight, amax)
        ctx.gemms, ctx.saved_as, ctx.shape = gemms, (own.format, own.granularity), x.shape
        return y_TO.view(-1, *x.shape[1:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        payload, scale, inverse, weight, amax = ctx.saved_tensors
        gemms, path, kernels = ctx.gemms, ctx.gemms.path, ctx.gemms.path.kernels
        dtype = path.precision.output
        dy_TO, dy_OT = path.grad_output.both(dy.reshape(-1, dy.shape[-1]), wgrad=True)
        fmt, granularity = ctx.saved_as
        x_IT = ScaledTensor(payload, scale, fmt, granularity, inverse)
        gathering = path.input_comm.gather(x_IT) if path.input_comm.gathers else None
        w_IO = gemms.weight.transposed(weight.detach(), amax=amax)
        dx_TI = kernels.gemm(dy_TO, w_IO, out_dtype=dtype)
        reducing = path.input_comm.reduce(dx_TI)
        if gathering is not None:
            x_IT = path.input.transposed_operand(gathering.wait())
        assert dy_OT is not None
        dw_OI = kernels.gemm(dy_OT, x_IT, out_dtype=dtype)
        return reducing.wait().view(ctx.shape), dw_OI.to(weight.dtype), None


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's layer that shards its output features, with FP8 GEMMs."""

    def __init__(self, *args: Any, precision: PrecisionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self, self.gather_output or self.weight is None or self.disable_grad_reduce)
        self.fp8_precision = precision
        self.fp8_gemms: Fp8Gemms | None = None

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[S/t,B,I] or [S,B,I] -> [S,B,O/t]; see Megatron's."""
        _check(self, weight is not None or bool(runtime_gather_output))
        if self.fp8_gemms is None:
            self.fp8_gemms = _gemms_of(self, is_column=True)
        return _with_bias(self, self.fp8_gemms(input_, self.weight))


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's layer that shards its input features, with FP8 GEMMs."""

    def __init__(self, *args: Any, precision: PrecisionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self, not self.input_is_parallel)
        self.fp8_precision = precision
        self.fp8_gemms: Fp8Gemms | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S,B,I/t] -> [S/t,B,O] or [S,B,O]; see Megatron's."""
        if self.fp8_gemms is None:
            self.fp8_gemms = _gemms_of(self, is_column=False)
        return _with_bias(self, self.fp8_gemms(input_, self.weight))


_REPLACEMENTS = {
    ColumnParallelLinear: Fp8ColumnParallelLinear,
    RowParallelLinear: Fp8RowParallelLinear,
}


def _check(layer: nn.Module, is_unusual: bool) -> None:
    if is_unusual or layer.is_expert:
        raise ValueError(
            f"{type(layer).__name__} is for the linear layers of attention and of a dense MLP: no "
            "experts, outputs that are gathered, or weights of another layer"
        )


def _gemms_of(layer: Any, *, is_column: bool) -> Fp8Gemms:
    return Fp8Gemms(
        layer.fp8_precision,
        (layer.output_size, layer.input_size),
        layer.tp_group,
        sequence_parallel=layer.sequence_parallel,
        is_column=is_column,
        device=layer.weight.device,
    )


def _with_bias(layer: Any, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Megatron's way: added, or returned where something else adds it."""
    if layer.skip_bias_add or layer.bias is None:
        return y, layer.bias
    return y + layer.bias, None
