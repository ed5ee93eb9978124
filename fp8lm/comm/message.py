"""Several tensors and their scales in one buffer of bytes.

    [payload 0 | .. | payload k-1 | all fp32 scales of those whose format has any | padding]

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
from fp8lm.numerics import PER_TENSOR, Format, Granularity
from fp8lm.scaled_tensor import ScaledTensor

ALIGNMENT = 16
_SCALE_BYTES = 4
_WORD = 8  # bytes that are copied at once where all are multiples of it


@dataclass(frozen=True)
class MessageLayout:
    """Offsets of a message's tensors; `parts` are their shapes and formats, in order.

    `granularities` are those of all parts (default: one scale per tensor).
    """

    parts: tuple[tuple[tuple[int, ...], Format], ...]
    granularities: tuple[Granularity, ...] = ()

    def __post_init__(self) -> None:
        if not self.granularities:
            object.__setattr__(self, "granularities", (PER_TENSOR,) * len(self.parts))

    @classmethod
    def of(cls, tensors: Sequence[ScaledTensor]) -> MessageLayout:
        """The layout for tensors of these shapes, formats and granularities."""
        parts = tuple((tuple(tensor.shape), tensor.format) for tensor in tensors)
        return cls(parts, tuple(tensor.granularity for tensor in tensors))

    @cached_property
    def scales_at(self) -> int:
        """Byte at which the scales start."""
        return sum(_padded(prod(shape) * fmt.bytes) for shape, fmt in self.parts)

    @cached_property
    def nbytes(self) -> int:
        """Size of the message, a multiple of 16."""
        return _padded(self.scales_at + sum(self._num_scales) * _SCALE_BYTES)

    def views(self, message: Tensor) -> list[ScaledTensor]:
        """The tensors that lie in `message` (uint8 [nbytes], starting at a multiple of 16).

        They share its memory: writing to one writes the message. Formats without a scale get 1.
        """
        return self.views_of([message])[0]

    def views_of(self, messages: Sequence[Tensor]) -> list[list[ScaledTensor]]:
        """`views` of each of `messages`."""
        one = torch.empty(())
        if messages and not all(fmt.scaled for _, fmt in self.parts):
            one = torch.ones((), device=messages[0].device)  # of all of them: a launch on a GPU
        return [self._views(message, one) for message in messages]

    def _views(self, message: Tensor, one: Tensor) -> list[ScaledTensor]:
        scales = self._scales(message).split(self._num_scales)
        tensors = []
        for (start, stop, shape, fmt), own, granularity in zip(
            self._payloads(), scales, self.granularities, strict=True
        ):
            payload = message[start:stop].view(fmt.storage).view(shape)
            scale = own.view(granularity.scale_shape(shape)) if fmt.scaled else one
            tensors.append(ScaledTensor(payload, scale, fmt, granularity))
        return tensors

    def pack(self, tensors: Sequence[ScaledTensor], message: Tensor | None = None) -> Tensor:
        """`tensors` (as the layout says) copied into `message`, or into a new one; uint8."""
        if message is None:
            device = tensors[0].device
            message = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        pack_all([self], [tensors], [message])
        return message

    def copies(
        self, tensors: Sequence[ScaledTensor], message: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes of `message`, and of `tensors` (as the layout says), which are to lie there."""
        if MessageLayout.of(tensors) != self:
            raise ValueError(f"{list(tensors)} do not have the layout {self.parts}")
        scales = self._scales(message).split(self._num_scales)
        for tensor, own, (start, stop, _, _) in zip(tensors, scales, self._payloads(), strict=True):
            yield message[start:stop], as_bytes(tensor.payload)
            if tensor.format.scaled:
                yield as_bytes(own), as_bytes(tensor.scale)

    @cached_property
    def _num_scales(self) -> list[int]:
        return [
            prod(granularity.scale_shape(shape)) if fmt.scaled else 0
            for (shape, fmt), granularity in zip(self.parts, self.granularities, strict=True)
        ]

    def _payloads(self) -> Iterator[tuple[int, int, tuple[int, ...], Format]]:
        start = 0
        for shape, fmt in self.parts:
            stop = start + prod(shape) * fmt.bytes
            yield start, stop, shape, fmt
            start = _padded(stop)

    def _scales(self, message: Tensor) -> Tensor:
        stop = self.scales_at + sum(self._num_scales) * _SCALE_BYTES
        return message[self.scales_at : stop].view(torch.float32)


def pack_all(
    layouts: Sequence[MessageLayout],
    tensors: Sequence[Sequence[ScaledTensor]],
    messages: Sequence[Tensor],
) -> None:
    """Copy the tensors of several messages into them, in a few launches for all."""
    wide: list[tuple[Tensor, Tensor]] = []
    narrow: list[tuple[Tensor, Tensor]] = []
    for layout, own, message in zip(layouts, tensors, messages, strict=True):
        for target, source in layout.copies(own, message):
            if not target.numel():
                continue
            if not any(x.storage_offset() % _WORD or x.numel() % _WORD for x in (target, source)):
                wide.append((target.view(torch.int64), source.view(torch.int64)))
            else:
                narrow.append((target, source))
    for copies in (wide, narrow):
        if copies:
            targets, sources = map(list, zip(*copies, strict=True))
            torch._foreach_copy_(targets, sources)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
