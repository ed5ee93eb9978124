"""The cast of a layer's tensor to low precision.

Every linear layer has a `Quantizer` for its input, its weight and its output gradient. It holds
format, granularity and the ranks that share the scale: a per-layer statistic, or a fallback to
BF16 attaches here.
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


class KnownScale(Protocol):
    """A scale that is known before the cast, and not taken from the amax of the tensor.

    It is of the tensor times `unit`, a power of two (0-d fp32 if steps differ in it): see
    `AmaxHistories.recording`.
    """

    unit: Tensor | float

    def __call__(self, amax: Tensor) -> Tensor:
        """The scale (0-d fp32) of a tensor with this `amax` (0-d fp32), NaN if it is not finite."""


class Quantizer:
    """Casts matrices to `format` with scales of `granularity`, just in time.

    Both GEMMs that read a tensor have scales of `granularity` along their own contraction: the
    transposed tensor of rows, or of blocks that are not square, is cast anew from `x`.

    `share_amax` reduces amaxes (fp32) over the ranks that hold the other parts of the tensor, which
    is cut along `sharded_dim`; None: this rank holds all of it. Scales of rows and blocks that end
    within a part are not shared; ValueError where a block would be cut. With `known_scale` there is
    one scale per tensor, nothing is shared, and what exceeds it saturates. `observer` is called
    after every cast.
    """

    def __init__(
        self,
        fmt: Format,
        kernels: Kernels,
        *,
        granularity: Granularity = PER_TENSOR,
        share_amax: Callable[[Tensor], Tensor] | None = None,
        sharded_dim: int = 0,
        known_scale: KnownScale | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.format = fmt
        self.kernels = kernels
        one_scale = not fmt.scaled or known_scale is not None
        self.granularity = PER_TENSOR if one_scale else granularity
        self.share_amax = share_amax
        self.sharded_dim = sharded_dim
        self.known_scale = known_scale if fmt.scaled else None
        self.observer = observer

    def __call__(self, x: Tensor, *, amax: Tensor | None = None) -> ScaledTensor:
        """`x` (bf16 or fp32) in `format`; `amax`: see `local_amax`, already shared."""
        return self._observed(x, self._cast(x, self.granularity, amax))

    def along_columns(self, x: Tensor, *, amax: Tensor | None = None) -> ScaledTensor:
        """`x` [R,C] in `format`, with the scales that its transposed has as an operand."""
        return self._observed(x, self._cast(x, self.granularity.transposed(), amax))

    def transposed(self, x: Tensor, *, amax: Tensor | None = None) -> ScaledTensor:
        """`x` [R,C] as GEMMs read its transposed [C,R]."""
        return self.kernels.transpose(self.along_columns(x, amax=amax))

    def with_transpose(
        self, x: Tensor, *, amax: Tensor | None = None, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """`x` [R,C] in `format`, and its transposed as GEMMs read it.

        `sums`: `Kernels.column_sums` of `x` are wanted next.
        """
        if not self.granularity.is_symmetric:
            transposed = self._cast(x, self.granularity.transposed(), amax)
            return self(x, amax=amax), self.kernels.transpose(transposed)
        if self.known_scale is not None or not self.granularity.is_per_tensor:
            quantized = self(x, amax=amax)
            return quantized, self.kernels.transpose(quantized)
        amax = self._shared_amax(x, self.granularity, amax)
        quantized, transposed = self.kernels.quantize_with_transpose(
            x, self.format, amax=amax, sums=sums
        )
        return self._observed(x, quantized), transposed

    def local_amax(self, x: Tensor) -> Tensor | None:
        """This rank's amax of `x`, for others to share: of the tensor, or of rows cut into parts.

        None where no scale is of elements that several ranks hold.
        """
        for granularity in (self.granularity, self.granularity.transposed()):
            if granularity.spans(self.sharded_dim):
                return self._amax(x, granularity)
        return None

    def _cast(self, x: Tensor, granularity: Granularity, amax: Tensor | None) -> ScaledTensor:
        if self.known_scale is not None:
            scale = self.known_scale(self.kernels.amax(x) if amax is None else amax)
            return ScaledTensor(self.kernels.cast(x, scale, self.format), scale, self.format)
        amax = self._shared_amax(x, granularity, amax)
        return self.kernels.quantize(x, self.format, amax=amax, granularity=granularity)

    def _shared_amax(
        self, x: Tensor, granularity: Granularity, amax: Tensor | None
    ) -> Tensor | None:
        """The amaxes of scales that several ranks share; None where `x` itself has them."""
        dim = self.sharded_dim
        if not granularity.spans(dim):
            if self.share_amax is not None and granularity.cuts(x.shape[dim], dim):
                raise ValueError(f"a part of {tuple(x.shape)} cuts {granularity}")
            return None
        if self.format.scaled and amax is None and self.share_amax is not None:
            return self.share_amax(self._amax(x, granularity))
        return amax

    def _amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        if granularity.is_per_tensor:
            return self.kernels.amax(x)
        return granularity.max(x.abs().float())

    def _observed(self, x: Tensor, quantized: ScaledTensor) -> ScaledTensor:
        if self.observer is not None:
            self.observer(x, quantized)
        return quantized

    def __repr__(self) -> str:
        return f"Quantizer({self.format}, {self.granularity})"


def quantizers_of(model: nn.Module) -> dict[tuple[str, TensorKind], Quantizer]:
    """All quantizers of `model`, by the path of their layer and the kind of tensor."""
    return {
        (name, kind): quantizer
        for name, module in model.named_modules()
        for kind, quantizer in getattr(module, "quantizers", {}).items()
    }
