"""The cast of a layer's tensor to low precision.

Every linear layer has a `Quantizer` for its input, its weight and its output gradient. It holds
format, granularity and the ranks that share the scale: a recipe with another scaling, a per-layer
statistic, or a fallback to BF16 attaches here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor, nn

from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import PER_TENSOR, Format, Granularity
from fp8lm.scaled_tensor import ScaledTensor

TensorKind = Literal["input", "weight", "grad_output"]
TENSOR_KINDS: tuple[TensorKind, ...] = ("input", "weight", "grad_output")


class Observer(Protocol):
    """Called after every cast of a quantizer; must not wait for the device or keep the tensors."""

    def __call__(self, x: Tensor, quantized: ScaledTensor) -> None:
        """`x` is the input (bf16 or fp32), `quantized` the result."""


class Quantizer:
    """Casts tensors to `format` with scales of `granularity`, just in time.

    `share_amax` reduces an amax (0-d fp32) over the ranks that hold the other shards of the tensor;
    None: this rank holds all of it. `observer` is called after every cast.
    """

    def __init__(
        self,
        fmt: Format,
        kernels: Kernels,
        *,
        granularity: Granularity = PER_TENSOR,
        share_amax: Callable[[Tensor], Tensor] | None = None,
        observer: Observer | None = None,
    ) -> None:
        if share_amax is not None and not granularity.is_per_tensor:
            raise ValueError(f"scales {granularity} are not shared between ranks")
        self.format = fmt
        self.kernels = kernels
        self.granularity = granularity
        self.share_amax = share_amax
        self.observer = observer

    def __call__(self, x: Tensor, *, amax: Tensor | None = None) -> ScaledTensor:
        """`x` (bf16 or fp32) in `format`; `amax`, already shared, if it is known."""
        amax = self._amax(x, amax)
        quantized = self.kernels.quantize(x, self.format, amax=amax, granularity=self.granularity)
        if self.observer is not None:
            self.observer(x, quantized)
        return quantized

    def with_transpose(
        self, x: Tensor, *, amax: Tensor | None = None
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """`x` [R,C] in `format`, and its transposed as GEMMs read it."""
        if not self.granularity.is_per_tensor:
            quantized = self(x, amax=amax)
            return quantized, self.kernels.transpose(quantized)
        amax = self._amax(x, amax)
        quantized, transposed = self.kernels.quantize_with_transpose(x, self.format, amax=amax)
        if self.observer is not None:
            self.observer(x, quantized)
        return quantized, transposed

    def _amax(self, x: Tensor, amax: Tensor | None) -> Tensor | None:
        if self.format.scaled and amax is None and self.share_amax is not None:
            return self.share_amax(self.kernels.amax(x))
        return amax

    def __repr__(self) -> str:
        return f"Quantizer({self.format}, {self.granularity})"


def quantizers_of(model: nn.Module) -> dict[tuple[str, TensorKind], Quantizer]:
    """All quantizers of `model`, by the path of their layer and the kind of tensor."""
    return {
        (name, kind): quantizer
        for name, module in model.named_modules()
        for kind, quantizer in getattr(module, "quantizers", {}).items()
    }
