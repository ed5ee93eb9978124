"""Casts of several tensors into the messages that carry them, and back: one launch for all.

Tensors of one shape are numbered; they, their payloads and their scales each lie in one memory at
equal distances, but for one gap where this rank's own part is left out: it is not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.amax import MAX_PARTS, largest_of, num_parts
from fp8lm.kernels.triton.cast import BLOCK
from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, encode, fact, inverse_of, magnitude, scale_of
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class Spacing:
    """Number i starts `stride` i elements after number 0; from `gap_at` on, `gap` further on."""

    stride: int
    gap_at: int
    gap: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Spacing | None:
        """That of contiguous `tensors` of one shape and dtype; None where they lie otherwise."""
        first = tensors[0]
        alike = {(tensor.shape, tensor.dtype, memory_of(tensor)) for tensor in tensors}
        if len(alike) > 1 or not all(tensor.is_contiguous() for tensor in tensors):
            return None
        starts = [int(tensor.storage_offset()) for tensor in tensors]
        steps = [after - before for before, after in pairwise(starts)]
        stride = min(steps, default=first.numel())
        gaps = [number for number, step in enumerate(steps, start=1) if step != stride]
        if not gaps:
            return cls(stride, len(tensors), 0)
        return cls(stride, gaps[0], steps[gaps[0] - 1] - stride) if len(gaps) == 1 else None


@dataclass(frozen=True)
class Messages:
    """Tensors of one format and granularity, and how they lie."""

    tensors: Sequence[ScaledTensor]
    payload: Spacing
    scale: Spacing

    @classmethod
    def of(cls, tensors: Sequence[ScaledTensor]) -> Messages | None:
        """None where they are not what these kernels read and write."""
        if len({(x.format, x.granularity) for x in tensors}) != 1:
            return None
        payload, scale = (
            Spacing.of([getattr(x, name) for x in tensors]) for name in ("payload", "scale")
        )
        if payload is None or scale is None or payload.gap or scale.gap:
            return None
        return cls(tensors, payload, scale)

    @property
    def operands(self) -> list[Tensor]:
        """Payloads, and the scales of formats that have any."""
        payloads = [x.payload for x in self.tensors]
        return payloads + [x.scale for x in self.tensors if x.format.scaled]


def quantize_chunks(sources: Sequence[Tensor], spacing: Spacing, targets: Messages) -> None:
    """Each of `sources` with the scale of its amax into its target; formats without: a cast."""
    first, x = targets.tensors[0], sources[0]
    numel, count = x.numel(), len(sources)
    amaxes, parts = x, 0
    if first.format.scaled:
        parts = num_parts(numel, BLOCK, max(1, MAX_PARTS // count))
        amaxes = torch.empty(count, parts, dtype=torch.int32, device=x.device)
        launch(
            amaxes_of_chunks,
            (parts, count),
            x,
            amaxes,
            numel,
            spacing.stride,
            spacing.gap_at,
            spacing.gap,
            reads=sources,
            writes=[amaxes],
            BLOCK=BLOCK,
        )
    launch(
        cast_chunks,
        (max(1, triton.cdiv(numel, BLOCK)), count),
        x,
        amaxes,
        first.payload,
        first.scale,
        numel,
        parts,
        spacing.stride,
        spacing.gap_at,
        spacing.gap,
        targets.payload.stride,
        targets.scale.stride,
        reads=[*sources, amaxes] if first.format.scaled else sources,
        writes=targets.operands,
        FORMAT=first.format.name,
        PARTS=triton.next_power_of_2(parts),
        BLOCK=BLOCK,
    )


def join(parts: Messages, dtype: torch.dtype) -> Tensor:
    """The values of `parts`, one after the other, in `dtype`."""
    first, count = parts.tensors[0], len(parts.tensors)
    numel = first.payload.numel()
    shape = (count * first.shape[0], *first.shape[1:])
    values = torch.empty(shape, dtype=dtype, device=first.device)
    launch(
        decode_chunks,
        (max(1, triton.cdiv(numel, BLOCK)), count),
        first.payload,
        first.scale,
        values,
        numel,
        parts.payload.stride,
        parts.scale.stride,
        reads=parts.operands,
        writes=[values],
        FORMAT=first.format.name,
        BLOCK=BLOCK,
    )
    return values


def memory_of(tensor: Tensor) -> int:
    """Equal for tensors that share memory, on the meta device too, where nothing has an address."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001


@triton.jit
def start_of(number, stride, gap_at, gap):
    """Where number `number` starts, in elements: see `Spacing`."""
    return number.to(tl.int64) * stride + tl.where(number >= gap_at, gap, 0)


@triton.jit
def amaxes_of_chunks(x_ptr, amax_ptr, numel, stride, gap_at, gap, BLOCK: tl.constexpr):
    """Of every chunk what `partial_amaxes` has of a tensor."""
    chunk, parts = tl.program_id(1), tl.num_programs(0)
    x_ptr += start_of(chunk, stride, gap_at, gap)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, parts.to(tl.int64) * BLOCK):
        x = tl.load(x_ptr + start + offsets, mask=start + offsets < numel, other=0.0)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
    tl.store(amax_ptr + chunk * parts + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def cast_chunks(
    x_ptr,
    amax_ptr,
    payload_ptr,
    scale_ptr,
    numel,
    parts,
    stride,
    gap_at,
    gap,
    payload_stride,
    scale_stride,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `quantize_chunks`."""
    chunk = tl.program_id(1)
    x_ptr += start_of(chunk, stride, gap_at, gap)
    payload_ptr += chunk.to(tl.int64) * payload_stride
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel).to(tl.float32)
    if fact(FORMAT, "scaled"):
        scale = scale_of(largest_of(amax_ptr + chunk * parts, parts, PARTS), FORMAT)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + chunk.to(tl.int64) * scale_stride, scale)
        x = x * scale
    tl.store(payload_ptr + offsets, encode(x, FORMAT), mask=offsets < numel)


@triton.jit
def decode_chunks(
    payload_ptr,
    scale_ptr,
    values_ptr,
    numel,
    payload_stride,
    scale_stride,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The kernel of `join`."""
    chunk = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(payload_ptr + chunk * payload_stride + offsets, mask=offsets < numel)
    values = decode(code, FORMAT)
    if fact(FORMAT, "scaled"):
        values = values * inverse_of(tl.load(scale_ptr + chunk * scale_stride))
    tl.store(values_ptr + chunk * numel + offsets, values, mask=offsets < numel)
