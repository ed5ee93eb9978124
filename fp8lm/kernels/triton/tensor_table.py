"""Tables on the device that tell a kernel of many tensors where they are, and which is whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes of the widest access, and elements of FP8 in it


class TensorTable:
    """`rows` (int64 [tensors, columns]) and `owners` (int32 [programs]), on the device.

    A row has the number of the first program of its tensor, and after it what the caller says.
    `owners` is the row of every program's tensor. Both are copied to the device only where they
    differ from the last step's: the addresses of weights and states stay, and mostly those of
    gradients.
    """

    def __init__(self) -> None:
        self.rows = self.owners = torch.empty(0)
        self._rows: list[tuple[int, ...]] = []
        self._programs: list[int] = []

    def update(
        self, rows: Sequence[Sequence[int]], programs: list[int], device: torch.device
    ) -> None:
        """Set the `rows` of tensors that have `programs` programs each."""
        if programs != self._programs or device != self.owners.device:
            counts = torch.tensor(programs)
            owners = torch.repeat_interleave(torch.arange(len(programs)), counts)
            self.owners, self._programs = _to_device(owners.to(torch.int32), device), programs
            self._rows = []
        first, numbered = 0, []
        for row, count in zip(rows, programs, strict=True):
            numbered.append((first, *row))
            first += count
        if numbered != self._rows:
            self.rows, self._rows = _to_device(torch.tensor(numbered), device), numbered


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # From pageable memory a copy would make the host wait.
    table = table.pin_memory() if device.type == "cuda" else table
    return table.to(device, non_blocking=True)


@triton.constexpr_function
def _pointer_type(FORMAT):
    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    return tl.pointer_type(types.get(FORMAT, tl.uint8))


@triton.jit
def pointer_at(address_ptr, FORMAT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A pointer to the payload whose address is in the table."""
    return tl.multiple_of(tl.load(address_ptr).to(_pointer_type(FORMAT)), ALIGNMENT)


@triton.jit
def tensor_at(address_ptr, FORMAT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to a payload and to its scale, whose addresses follow each other."""
    payload_ptr = pointer_at(address_ptr, FORMAT, ALIGNMENT)
    return payload_ptr, tl.load(address_ptr + 1).to(_pointer_type("fp32"))


@triton.jit
def block_scales(
    scale_ptr,
    start,
    numel,
    SCALE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """Scales of `BLOCK` elements from `start` on; a thread loads one, if its elements share it."""
    SHARED: tl.constexpr = PER_THREAD if SCALE_BLOCK % PER_THREAD == 0 else 1
    first = start + tl.arange(0, BLOCK // SHARED) * SHARED
    scales = tl.load(scale_ptr + first // SCALE_BLOCK, mask=first < numel, other=1.0)
    return tl.reshape(tl.broadcast_to(scales[:, None], (BLOCK // SHARED, SHARED)), (BLOCK,))
