"""A tensor in low precision together with its scale.

    payload = cast(x * scale)          x ~ payload / scale

A plain class, not a tensor subclass: an operation that is not listed here raises, instead of
quietly computing on bare codes or quietly dequantizing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.numerics import Format, scale_from_amax


class ScaledTensor:
    """`payload` (any shape, dtype `format.storage`), `scale` (0-d fp32, same device), `format`."""

    __slots__ = ("format", "payload", "scale")

    def __init__(self, payload: Tensor, scale: Tensor, fmt: Format) -> None:
        if payload.dtype != fmt.storage:
            raise TypeError(f"{fmt} is stored as {fmt.storage}, not {payload.dtype}")
        if scale.dtype != torch.float32 or scale.ndim != 0:
            raise TypeError(f"a scale is a 0-d fp32 tensor, not {scale.dtype} of {scale.shape}")
        self.payload = payload
        self.scale = scale
        self.format = fmt

    @classmethod
    def zeros(cls, shape: tuple[int, ...], fmt: Format, device: torch.device) -> ScaledTensor:
        """All zeros with scale 1 (code 0 is the number 0 in every format)."""
        payload = torch.zeros(shape, dtype=fmt.storage, device=device)
        return cls(payload, torch.ones((), device=device), fmt)

    @property
    def shape(self) -> torch.Size:
        """Shape of the payload."""
        return self.payload.shape

    @property
    def device(self) -> torch.device:
        """Device of payload and scale."""
        return self.payload.device

    @property
    def nbytes(self) -> int:
        """Bytes held: the payload, and 4 for the scale where the format has one."""
        return self.payload.nbytes + (self.scale.nbytes if self.format.scaled else 0)

    @property
    def fp8(self) -> Tensor:
        """The payload viewed in the format's own dtype (unscaled codes)."""
        return self.payload.view(self.format.dtype)

    @property
    def operand(self) -> tuple[Tensor, Tensor, Format]:
        """(payload, scale, format), as the kernels take it."""
        return self.payload, self.scale, self.format

    def view(self, *shape: int) -> ScaledTensor:
        """The same elements in another shape; payload and scale are shared."""
        return self._with(self.payload.view(*shape))

    def t(self) -> ScaledTensor:
        """The transposed matrix, a view."""
        return self._with(self.payload.t())

    def rows(self, start: int, stop: int) -> ScaledTensor:
        """Rows `start` to `stop` of the first dimension, a view with the same scale."""
        return self._with(self.payload[start:stop])

    def clone(self) -> ScaledTensor:
        """An independent copy of payload and scale."""
        return ScaledTensor(self.payload.clone(), self.scale.clone(), self.format)

    def copy_(self, other: ScaledTensor) -> ScaledTensor:
        """Take over payload and scale of `other`, which has the same format and shape."""
        if other.format != self.format or other.shape != self.shape:
            raise TypeError(f"cannot copy {other} into {self}")
        self.payload.copy_(other.payload)
        self.scale.copy_(other.scale)
        return self

    def dequantize(self, kernels: ReferenceKernels, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values in `dtype` (bf16 or fp32)."""
        return kernels.dequantize(self.payload, self.scale, self.format, dtype)

    def _with(self, payload: Tensor) -> ScaledTensor:
        return ScaledTensor(payload, self.scale, self.format)

    def __repr__(self) -> str:
        return f"ScaledTensor({tuple(self.shape)}, {self.format})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs=None):  # noqa: ANN001, ANN206
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name} is not defined on a ScaledTensor: dequantize it first")


def quantize(
    x: Tensor, fmt: Format, kernels: ReferenceKernels, *, amax: Tensor | None = None
) -> ScaledTensor:
    """`x` (bf16 or fp32) in `fmt`, with the scale of `amax` (0-d fp32; default: that of `x`).

    Pass `amax` when it was reduced over the ranks that hold the other shards of the tensor.
    """
    if not fmt.scaled:
        return ScaledTensor(
            x.to(fmt.dtype), torch.ones((), dtype=torch.float32, device=x.device), fmt
        )
    shared = amax is not None
    scale = scale_from_amax(kernels.amax(x) if amax is None else amax, fmt)
    return ScaledTensor(kernels.cast(x, scale, fmt, saturate=shared), scale, fmt)
