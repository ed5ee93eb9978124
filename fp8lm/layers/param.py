"""The trainable tensors of a model, whatever their format.

A `Weight` is the unit that optimizer, data parallelism and checkpoint work on: a compute copy
(what forward and backward read), a description of the logical tensor, and the accumulator its
gradient goes to. Two kinds:

    GemmWeight     a matrix; layers read it through `operand()` and add its gradient themselves
    VectorWeight   a norm's or bias's vector; an ordinary autograd parameter
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8lm.gradient.accumulator import GradientAccumulator
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.deferred import DeferredGradients
from fp8lm.layers.split import WHOLE, Split
from fp8lm.numerics import BF16, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor, quantize

Initializer = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class WeightSpec:
    """What a weight is: its logical `shape`, and the part of it that this rank holds.

    `partial_grad`: each tensor-parallel rank computes this replicated weight's gradient from its
    own part of the sequence, so the ranks' gradients have to be summed.
    `dense`: not a matrix of a linear layer, but a table, norm or bias.
    """

    shape: tuple[int, ...]
    init: Initializer
    format: Format
    grad_format: Format
    decay: bool = True
    split: Split = WHOLE
    partial_grad: bool = False
    dense: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what this rank holds."""
        return self.split.local_shape(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements this rank holds."""
        return math.prod(self.local_shape)


class Weight(nn.Module):
    """Common part: `spec`, `grad`, and `compute`, the compute copy as a ScaledTensor."""

    def __init__(self, spec: WeightSpec, kernels: ReferenceKernels, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.kernels = kernels
        self.grad = GradientAccumulator(spec.local_shape, spec.grad_format, kernels, device)

    @property
    def compute(self) -> ScaledTensor:
        """Views of payload and scale: writing to them changes the weight."""
        raise NotImplementedError

    def rebind(self, payload: Tensor) -> None:
        """Keep the payload in other memory (same dtype and shape)."""
        raise NotImplementedError

    def when_gradient_complete(self, call: Callable[[], None]) -> None:
        """Have `call` called in every backward once all uses of the weight are behind it."""
        self._differentiated.register_post_accumulate_grad_hook(lambda _: call())

    @property
    def _differentiated(self) -> nn.Parameter:
        """What autograd sees of the weight."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        part = "" if spec.split.is_whole else f" of {spec.shape}"
        return f"{spec.local_shape}{part}, {spec.format}, grad={spec.grad_format}"


class GemmWeight(Weight):
    """A matrix held as payload and scale.

    The payload of an FP8 weight is uint8, so `module.float()` or `.to(torch.bfloat16)` cannot turn
    it into unscaled numbers; the scale is kept in fp32 through any such call. `operand_format` is
    what GEMMs read (default: the stored format).
    """

    def __init__(
        self,
        spec: WeightSpec,
        kernels: ReferenceKernels,
        device: torch.device,
        operand_format: Format | None = None,
    ) -> None:
        super().__init__(spec, kernels, device)
        self.operand_format = operand_format or spec.format
        self.known_amax: Tensor | None = None  # see `operand_amax.known_amaxes`
        self.deferred = DeferredGradients()
        initial = ScaledTensor.zeros(spec.local_shape, spec.format, device)
        self.register_buffer("payload", initial.payload)
        self.register_buffer("scale", initial.scale)
        # Something for autograd to differentiate, so that a layer's backward runs even when its
        # input needs no gradient; it is empty and its gradient is always None.
        self.anchor = nn.Parameter(torch.empty(0, device=device))

    @property
    def compute(self) -> ScaledTensor:
        """The stored payload and scale."""
        return ScaledTensor(self.payload, self.scale, self.spec.format)

    def rebind(self, payload: Tensor) -> None:
        """See `Weight`."""
        self.payload = payload

    def defer_gradient(self, deferred: DeferredGradients) -> None:
        """Let `deferred` say when the wgrad GEMM runs."""
        self.deferred = deferred

    @property
    def _differentiated(self) -> nn.Parameter:
        return self.anchor

    @property
    def is_recast(self) -> bool:
        """Whether every use casts the weight with a scale."""
        return self.operand_format.scaled and self.operand_format != self.spec.format

    def local_amax(self) -> Tensor:
        """The amax of this rank's part, 0-d fp32."""
        return self.kernels.amax(self._values())

    def operand(self, share_amax: Callable[[Tensor], Tensor] = lambda amax: amax) -> ScaledTensor:
        """The weight in `operand_format`; requantized only if stored in another one.

        `share_amax` reduces an amax (0-d fp32) over the ranks that hold the other parts.
        """
        if self.operand_format == self.spec.format:
            return self.compute
        values, amax = self._values(), self.known_amax
        if self.is_recast and amax is None:
            amax = share_amax(self.kernels.amax(values))
        return quantize(values, self.operand_format, self.kernels, amax=amax)

    def _values(self) -> Tensor:
        exact = torch.bfloat16 if self.spec.format == BF16 else torch.float32
        return self.compute.dequantize(self.kernels, exact)

    def _apply(self, fn: Callable, recurse: bool = True) -> GemmWeight:
        # Follow changes of device, never changes of dtype: a payload without the scale it was
        # cast with is a different number.
        device = _device_after(fn, self.payload.device)
        self.payload = self.payload.to(device)
        self.scale = self.scale.to(device)
        self.anchor.data = self.anchor.data.to(device)
        return self


class VectorWeight(Weight):
    """A small tensor used through autograd; its gradient moves to the accumulator at once."""

    def __init__(self, spec: WeightSpec, kernels: ReferenceKernels, device: torch.device) -> None:
        super().__init__(spec, kernels, device)
        initial = torch.zeros(spec.local_shape, dtype=spec.format.dtype, device=device)
        self.data = nn.Parameter(initial)
        # Autograd would sum micro-batches in the parameter's bf16.
        self.data.register_post_accumulate_grad_hook(self._collect)

    @property
    def compute(self) -> ScaledTensor:
        """The parameter's data, with scale 1."""
        data = self.data.data
        return ScaledTensor(data, torch.ones((), device=data.device), self.spec.format)

    def rebind(self, payload: Tensor) -> None:
        """See `Weight`."""
        self.data.data = payload

    @property
    def _differentiated(self) -> nn.Parameter:
        return self.data

    def _apply(self, fn: Callable, recurse: bool = True) -> VectorWeight:
        # As a GemmWeight: another dtype would promote activations and not be what `spec` says.
        self.data.data = self.data.data.to(_device_after(fn, self.data.device))
        return self

    def _collect(self, parameter: Tensor) -> None:
        self.grad.add(parameter.grad)
        parameter.grad = None


def _device_after(fn: Callable, device: torch.device) -> torch.device:
    return fn(torch.empty(0, device=device)).device


def vector_spec(
    size: int, value: float, fmt: Format, *, split: Split = WHOLE, partial_grad: bool = False
) -> WeightSpec:
    """Spec of a norm's or bias's vector: constant start, fp32 gradient, no weight decay."""

    def init(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return tensor.fill_(value)

    return WeightSpec(
        (size,), init, fmt, FP32, decay=False, split=split, partial_grad=partial_grad, dense=True
    )


def named_weights(module: nn.Module) -> dict[str, Weight]:
    """All weights of `module` by their path, which is the Megatron parameter name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Weight)}
