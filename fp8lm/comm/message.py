"""Several tensors and their scales in one buffer of bytes.

    [payload 0 | .. | payload k-1 | fp32 scales of those whose format has one | padding]

Payloads and the whole message start at multiples of 16 bytes, as tensor cores want them, so a
received tensor is a view that a GEMM can read where it lies. One FP8 tensor of n elements is
n + 16 bytes (n a multiple of 16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from fp8lm.comm.transport import as_bytes
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

ALIGNMENT = 16
_SCALE_BYTES = 4


@dataclass(frozen=True)
class MessageLayout:
    """Offsets of a message's tensors; `parts` are their shapes and formats, in order."""

    parts: tuple[tuple[tuple[int, ...], Format], ...]

    @classmethod
    def of(cls, tensors: Sequence[ScaledTensor]) -> MessageLayout:
        """The layout for tensors of these shapes and formats."""
        return cls(tuple((tuple(tensor.shape), tensor.format) for tensor in tensors))

    @cached_property
    def scales_at(self) -> int:
        """Byte at which the scales start."""
        return sum(_padded(prod(shape) * fmt.bytes) for shape, fmt in self.parts)

    @cached_property
    def nbytes(self) -> int:
        """Size of the message, a multiple of 16."""
        num_scales = sum(fmt.scaled for _, fmt in self.parts)
        return _padded(self.scales_at + num_scales * _SCALE_BYTES)

    def views(self, message: Tensor) -> list[ScaledTensor]:
        """The tensors that lie in `message` (uint8 [nbytes], starting at a multiple of 16).

        They share its memory: writing to one writes the message. Formats without a scale get 1.
        """
        scales = iter(self._scales(message))
        return [
            ScaledTensor(
                message[start:stop].view(fmt.storage).view(shape),
                next(scales) if fmt.scaled else torch.ones((), device=message.device),
                fmt,
            )
            for start, stop, shape, fmt in self._payloads()
        ]

    def pack(self, tensors: Sequence[ScaledTensor], message: Tensor | None = None) -> Tensor:
        """`tensors` (as the layout says) copied into `message`, or into a new one; uint8."""
        if MessageLayout.of(tensors) != self:
            raise ValueError(f"{list(tensors)} do not have the layout {self.parts}")
        if message is None:
            device = tensors[0].device
            message = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        for tensor, (start, stop, _, _) in zip(tensors, self._payloads(), strict=True):
            message[start:stop].copy_(as_bytes(tensor.payload))
        scaled = [tensor.scale for tensor in tensors if tensor.format.scaled]
        if scaled:
            torch.stack(scaled, out=self._scales(message))
        return message

    def _payloads(self) -> Iterator[tuple[int, int, tuple[int, ...], Format]]:
        start = 0
        for shape, fmt in self.parts:
            stop = start + prod(shape) * fmt.bytes
            yield start, stop, shape, fmt
            start = _padded(stop)

    def _scales(self, message: Tensor) -> Tensor:
        num_scales = sum(fmt.scaled for _, fmt in self.parts)
        stop = self.scales_at + num_scales * _SCALE_BYTES
        return message[self.scales_at : stop].view(torch.float32)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
