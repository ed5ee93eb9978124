"""A tensor in low precision together with its scale.

    payload = cast(x * scale)          x ~ payload / scale

A plain class, not a tensor subclass: an operation that is not listed here raises, instead of
quietly computing on bare codes or quietly dequantizing. Kernels make, read and multiply it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8lm.numerics import PER_ROW, PER_TENSOR, Format, Granularity


class ScaledTensor:
    """`payload` (any shape, dtype `format.storage`), `scale`, `format`, `granularity`.

    `scale` (fp32, same device) has the shape that `granularity` gives it: 0-d per tensor.
    `inverse` is 1 / scale where the kernel that found the scale wrote that too, else None: such a
    scale is not written to again.
    """

    __slots__ = ("format", "granularity", "inverse", "payload", "scale")

    def __init__(
        self,
        payload: Tensor,
        scale: Tensor,
        fmt: Format,
        granularity: Granularity = PER_TENSOR,
        inverse: Tensor | None = None,
    ) -> None:
        if payload.dtype != fmt.storage:
            raise TypeError(f"{fmt} is stored as {fmt.storage}, not {payload.dtype}")
        shape = granularity.scale_shape(payload.shape)
        if scale.dtype != torch.float32 or scale.shape != shape:
            raise TypeError(
                f"a scale {granularity} is fp32 of shape {shape}, "
                f"not {scale.dtype} of {tuple(scale.shape)}"
            )
        self.payload = payload
        self.scale = scale
        self.format = fmt
        self.granularity = granularity
        self.inverse = inverse

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, ...],
        fmt: Format,
        device: torch.device,
        granularity: Granularity = PER_TENSOR,
    ) -> ScaledTensor:
        """All zeros with scale 1 (code 0 is the number 0 in every format)."""
        payload = torch.zeros(shape, dtype=fmt.storage, device=device)
        scale = torch.ones(granularity.scale_shape(shape), device=device)
        return cls(payload, scale, fmt, granularity)

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

    def inverse_scale(self) -> Tensor:
        """1 / scale: `inverse`, or computed."""
        return self.scale.reciprocal() if self.inverse is None else self.inverse

    def view(self, *shape: int) -> ScaledTensor:
        """The same elements in another shape; payload and scale are shared (per tensor only)."""
        self._check_per_tensor("view")
        payload = self.payload.view(*shape)
        return ScaledTensor(payload, self.scale, self.format, inverse=self.inverse)

    def t(self) -> ScaledTensor:
        """The transposed matrix, a view."""
        scale = self.scale if self.granularity.is_per_tensor else self.scale.t()
        inverse = self.inverse if self.granularity.is_per_tensor else None
        granularity = self.granularity.transposed()
        return ScaledTensor(self.payload.t(), scale, self.format, granularity, inverse)

    def rows(self, start: int, stop: int) -> ScaledTensor:
        """Rows `start` to `stop` of the first dimension, a view with the same scale or scales."""
        scale = self.scale
        if self.granularity.rows == 1:
            scale = scale[start:stop]
        else:
            self._check_per_tensor("rows")
        return ScaledTensor(self.payload[start:stop], scale, self.format, self.granularity)

    def elements(self, start: int, stop: int) -> ScaledTensor:
        """Elements `start` to `stop` (or the last) as they lie in memory, a view.

        1-d; with scales per block of a row [.., block], a scale per row. The range then starts and
        stops between blocks, which divide a row: ValueError otherwise.
        """
        payload = self.payload.view(-1)[start:stop]
        if self.granularity.is_per_tensor:
            return ScaledTensor(payload, self.scale, self.format)
        block = self.granularity.columns
        if self.granularity.rows != 1 or not block or self.shape[-1] % block:
            raise ValueError(f"scales {self.granularity} are not of consecutive elements")
        if start % block or payload.numel() % block:
            raise ValueError(f"{start} to {stop} are not whole blocks of {block}")
        first = start // block
        scale = self.scale.view(-1, 1)[first : first + payload.numel() // block]
        return ScaledTensor(payload.view(-1, block), scale, self.format, PER_ROW)

    def clone(self) -> ScaledTensor:
        """An independent copy of payload and scale."""
        return ScaledTensor(self.payload.clone(), self.scale.clone(), self.format, self.granularity)

    def copy_(self, other: ScaledTensor) -> ScaledTensor:
        """Copy payload and scale from `other`, which has the same format and shape."""
        same = (self.format, self.granularity, self.shape)
        if (other.format, other.granularity, other.shape) != same:
            raise TypeError(f"cannot copy {other} into {self}")
        self.payload.copy_(other.payload)
        self.scale.copy_(other.scale)
        self.inverse = None
        return self

    def _check_per_tensor(self, operation: str) -> None:
        if not self.granularity.is_per_tensor:
            raise TypeError(f"{operation} is not defined for scales {self.granularity}")

    def __repr__(self) -> str:
        blocks = "" if self.granularity.is_per_tensor else f", {self.granularity}"
        return f"ScaledTensor({tuple(self.shape)}, {self.format}{blocks})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs=None):  # noqa: ANN001, ANN206
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name} is not defined on a ScaledTensor: dequantize it")
