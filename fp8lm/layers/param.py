"""The trainable tensors of a model, whatever their format.

A `Param` is the unit that optimizer, data parallelism and checkpoint work on: the model parameter
(what forward and backward read), a description of the logical tensor, and its main gradient. Two
kinds:

    QuantizedParam   a matrix; layers read it through `operand()` and add its gradient themselves
    VectorParam      a norm's or bias's vector; an ordinary autograd parameter
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8lm.comm.dims import DENSE, REPLICA_AXIS
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.main_grad import MainGrad
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.shard_spec import REPLICATED, ShardSpec
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.numerics import BF16, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor

Initializer = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """The description of a weight: its logical `shape`, and the shard that this rank holds.

    `sequence_parallel`: replicated, with a gradient of this rank's part of the sequence only (or
    of its heads), so that gradients have to be summed over the tensor-parallel group.
    `keep_high_precision`: an embedding, norm or bias, which no preset stores in FP8.
    `group`: the name of its `fp8lm.comm.groups.ParamGroup`, the ranks that share it.
    `trainable` False: frozen, without gradient buffer or optimizer states.
    """

    shape: tuple[int, ...]
    init: Initializer
    format: Format
    grad_format: Format
    decay: bool = True
    shard_spec: ShardSpec = REPLICATED
    sequence_parallel: bool = False
    keep_high_precision: bool = False
    group: str = DENSE
    trainable: bool = True

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's shard."""
        return self.shard_spec.local_shape(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements this rank holds."""
        return math.prod(self.local_shape)


class Param(nn.Module):
    """Common part: `spec`, `main_grad`, and `model_param`, which forward and backward read."""

    def __init__(self, spec: ParamSpec, kernels: Kernels, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.kernels = kernels
        self._main_grad = None
        if spec.trainable:
            self._main_grad = MainGrad(spec.local_shape, spec.grad_format, kernels, device)

    @property
    def main_grad(self) -> MainGrad:
        """The gradient summed over micro-batches; RuntimeError for a frozen weight."""
        if self._main_grad is None:
            raise RuntimeError("a frozen weight has no gradient")
        return self._main_grad

    def freeze(self) -> None:
        """Stop training the weight and drop its gradient buffer.

        Call it before an optimizer or data parallelism is built on the weight.
        """
        self.spec = replace(self.spec, trainable=False)
        self._main_grad = None
        self._differentiated.requires_grad_(False)

    def set_value(self, value: Tensor) -> Tensor:
        """Set to this rank's shard of the whole fp32 `value`; returns the amax of the whole.

        All shards get the scale of the whole tensor.
        """
        target = self.model_param
        value = value.to(target.device)
        amax = self.kernels.amax(value)
        part = self.spec.shard_spec.take(value)
        target.copy_(self.kernels.quantize(part, target.format, amax=amax))
        return amax

    @property
    def model_param(self) -> ScaledTensor:
        """Views of payload and scale: writing to them changes the weight."""
        raise NotImplementedError

    def bind_storage(self, payload: Tensor) -> None:
        """Keep the payload in other memory (same dtype and shape)."""
        raise NotImplementedError

    def bind_scale(self, scale: Tensor) -> None:
        """Keep the scale in other memory (0-d fp32), if the format has one."""

    def alias(self, source: Param) -> None:
        """Become a frozen view of `source`, of the same spec: its payload and scale are read.

        For a second model of the same weights: neither copies nor allocates.
        """
        raise NotImplementedError

    def when_gradient_complete(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call `method(*arguments)` in every backward, after the last use of the weight.

        `method` is bound to an object, which this does not keep alive.
        """
        _after_gradient(self._differentiated, method, *arguments)

    @property
    def _differentiated(self) -> nn.Parameter:
        """The tensor that autograd sees for the weight."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        part = "" if spec.shard_spec.is_whole else f" of {spec.shape}"
        return f"{spec.local_shape}{part}, {spec.format}, grad={spec.grad_format}"


@dataclass
class OperandCache:
    """Amax and operands of a weight within one step; `keep`: keep what dgrad reads, too.

    A weight is cast to a scaled format once, and its operand kept.
    `amax` is `Quantizer.local_amax`, shared. `inverse` is that of the scale of a weight that GEMMs
    read as it is stored.
    """

    amax: Tensor | None = None
    inverse: Tensor | None = None
    keep: bool = False
    operand: ScaledTensor | None = None
    transposed: ScaledTensor | None = None


class QuantizedParam(Param):
    """A matrix held as payload and scale.

    The payload of an FP8 weight is uint8, so `module.float()` or `.to(torch.bfloat16)` cannot turn
    it into unscaled numbers; the scale is kept in fp32 through any such call. `quantizer` casts
    it for the GEMMs if their format is not the stored one (the default), once per step;
    `cache_operands` keeps what dgrad reads, too.
    """

    payload: Tensor
    scale: Tensor

    def __init__(
        self,
        spec: ParamSpec,
        kernels: Kernels,
        device: torch.device,
        quantizer: Quantizer | None = None,
        *,
        cache_operands: bool = False,
    ) -> None:
        super().__init__(spec, kernels, device)
        self.quantizer = quantizer or Quantizer(spec.format, kernels)
        self.cache_operands = cache_operands
        self.cache: OperandCache | None = None  # see `cached_weight_operands`
        self.wgrad_store = WeightGradStore()
        initial = ScaledTensor.zeros(spec.local_shape, spec.format, device)
        self.register_buffer("payload", initial.payload)
        self.register_buffer("scale", initial.scale)
        # Something for autograd to differentiate, so that a layer's backward runs even when its
        # input needs no gradient; it is empty and its gradient is always None.
        proxy = torch.empty(0, device=device)
        self.autograd_proxy = nn.Parameter(proxy, requires_grad=spec.trainable)

    @property
    def model_param(self) -> ScaledTensor:
        """The stored payload and scale."""
        return ScaledTensor(self.payload, self.scale, self.spec.format)

    def bind_storage(self, payload: Tensor) -> None:
        """See `Param`."""
        self.payload = payload

    def bind_scale(self, scale: Tensor) -> None:
        """See `Param`."""
        self.scale = scale.copy_(self.scale)

    def alias(self, source: Param) -> None:
        """See `Param`."""
        held = source.model_param
        self.freeze()
        self.payload, self.scale = held.payload, held.scale
        proxy = torch.empty(0, device=held.payload.device)
        self.autograd_proxy = nn.Parameter(proxy, requires_grad=False)

    def use_wgrad_store(self, wgrad_store: WeightGradStore) -> None:
        """Run the wgrad GEMM when `wgrad_store` says so."""
        self.wgrad_store = wgrad_store

    @property
    def _differentiated(self) -> nn.Parameter:
        return self.autograd_proxy

    @property
    def needs_cast(self) -> bool:
        """Whether the GEMMs' format is scaled and differs from the stored one."""
        fmt = self.quantizer.format
        return fmt.scaled and fmt != self.spec.format

    @property
    def operand_bytes(self) -> int:
        """Bytes that operands take for the length of a step, beyond the weight itself."""
        fmt, numel = self.quantizer.format, self.payload.numel()
        copies = int(self.needs_cast)
        if self.cache_operands:
            copies = (fmt != self.spec.format) + self.kernels.copies_transposed(fmt)
        return copies * numel * fmt.bytes

    def local_amax(self) -> Tensor | None:
        """What this rank's shard tells the others for the cast; see `Quantizer.local_amax`."""
        return self.quantizer.local_amax(self._values())

    def operand(self) -> ScaledTensor:
        """The weight as forward's GEMM reads it; requantized only if stored in another format."""
        cache = self.cache or OperandCache()
        if self.quantizer.format == self.spec.format:
            return ScaledTensor(self.payload, self.scale, self.spec.format, inverse=cache.inverse)
        if cache.operand is not None:
            return cache.operand
        if cache.keep and self.spec.trainable:  # else nothing reads it transposed
            both = self.quantizer.with_transpose(self._values(), amax=cache.amax)
            cache.operand, cache.transposed = both
            return cache.operand
        operand = self.quantizer(self._values(), amax=cache.amax)
        if cache.keep or self.needs_cast:
            cache.operand = operand
        return operand

    def operand_of_columns(self, factors: Tensor) -> ScaledTensor:
        """The weight, its columns times `factors` [I], as forward's GEMM reads it; never kept."""
        values, of_weight = self._values(), self.quantizer
        quantizer = Quantizer(  # with a scale of its own, whatever that of the weight is
            of_weight.format,
            self.kernels,
            granularity=of_weight.granularity,
            share_amax=of_weight.share_amax,
            sharded_dim=of_weight.sharded_dim,
        )
        return quantizer(values * factors.to(values.dtype))

    def transposed_operand(self) -> ScaledTensor:
        """The weight as dgrad's GEMM reads it."""
        cache = self.cache or OperandCache()
        if cache.transposed is not None:
            return cache.transposed
        if self.needs_cast and not self.quantizer.granularity.is_symmetric:
            transposed = self.quantizer.transposed(self._values(), amax=cache.amax)
        else:
            transposed = self.kernels.transpose(self.operand())
        if cache.keep:
            cache.transposed = transposed
        return transposed

    def _values(self) -> Tensor:
        exact = torch.bfloat16 if self.spec.format == BF16 else torch.float32
        return self.kernels.dequantize(self.model_param, exact)

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantizedParam:
        # Follow changes of device, never changes of dtype: a payload without the scale it was
        # cast with is a different number.
        device = _device_after(fn, self.payload.device)
        self.payload = self.payload.to(device)
        self.scale = self.scale.to(device)
        self.autograd_proxy.data = self.autograd_proxy.data.to(device)
        return self


class VectorParam(Param):
    """A small tensor used through autograd; its gradient moves to the accumulator at once."""

    def __init__(self, spec: ParamSpec, kernels: Kernels, device: torch.device) -> None:
        super().__init__(spec, kernels, device)
        initial = torch.zeros(spec.local_shape, dtype=spec.format.dtype, device=device)
        self.param = nn.Parameter(initial, requires_grad=spec.trainable)
        self._one = torch.ones((), device=device)
        if spec.trainable:
            # Autograd would sum micro-batches in the parameter's bf16.
            _after_gradient(self.param, self._collect)

    @property
    def model_param(self) -> ScaledTensor:
        """The parameter's data, with scale 1."""
        return ScaledTensor(self.param.data, self._one, self.spec.format)

    def bind_storage(self, payload: Tensor) -> None:
        """See `Param`."""
        self.param.data = payload

    def alias(self, source: Param) -> None:
        """See `Param`."""
        held = source.model_param
        self.freeze()
        self.param, self._one = nn.Parameter(held.payload, requires_grad=False), held.scale

    @property
    def _differentiated(self) -> nn.Parameter:
        return self.param

    def _apply(self, fn: Callable, recurse: bool = True) -> VectorParam:
        # As in QuantizedParam: another dtype would promote activations and contradict `spec`.
        self.param.data = self.param.data.to(_device_after(fn, self.param.device))
        self._one = self._one.to(self.param.device)
        return self

    def _collect(self) -> None:
        if self.param.grad is not None:
            self.main_grad.add(self.param.grad)
        self.param.grad = None


def _after_gradient(parameter: nn.Parameter, method: Callable[..., None], *arguments: Any) -> None:
    # Weakly: Python's collector does not see what an autograd hook refers to, so that a parameter
    # whose hook refers to what holds it is never freed, nor is anything that this refers to.
    bound = weakref.WeakMethod(method)

    def hook(_: Tensor) -> None:
        if (call := bound()) is not None:
            call(*arguments)

    parameter.register_post_accumulate_grad_hook(hook)


def _device_after(fn: Callable, device: torch.device) -> torch.device:
    return fn(torch.empty(0, device=device)).device


def vector_spec(
    size: int,
    value: float,
    fmt: Format,
    *,
    shard_spec: ShardSpec = REPLICATED,
    sequence_parallel: bool = False,
    group: str = DENSE,
) -> ParamSpec:
    """Spec of a norm's or bias's vector: constant start, fp32 gradient, no weight decay."""

    def init(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return tensor.fill_(value)

    return ParamSpec(
        (size,),
        init,
        fmt,
        FP32,
        decay=False,
        shard_spec=shard_spec,
        sequence_parallel=sequence_parallel,
        keep_high_precision=True,
        group=group,
    )


def by_group(params: Mapping[str, Param]) -> dict[str, dict[str, Param]]:
    """`params` by parameter group, without empty groups; the order is the same on all ranks."""
    groups = {
        group: {name: param for name, param in params.items() if param.spec.group == group}
        for group in REPLICA_AXIS
    }
    return {group: members for group, members in groups.items() if members}


def named_params(module: nn.Module) -> dict[str, Param]:
    """All weights of `module` by their path, which is the Megatron parameter name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Param)}


def freeze(module: nn.Module) -> None:
    """Freeze all weights of `module`; see `Param.freeze`."""
    for weight in named_params(module).values():
        weight.freeze()


def trainable(weights: Mapping[str, Param]) -> dict[str, Param]:
    """Those of `weights` that are not frozen."""
    return {name: weight for name, weight in weights.items() if weight.spec.trainable}
