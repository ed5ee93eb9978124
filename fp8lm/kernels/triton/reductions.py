"""Sums of squares and amaxes of many tensors: a launch for all that are alike, and one for the end.

A program takes a chunk of one tensor and leaves its sum and its amax behind; in the last launch a
program adds up those of one tensor, in their order. Squares and their sum are fp64, in an order of
their own: n terms of one sign, so that the relative error is below n 2^-53, as that of any order
is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import decode, fact, inverse_of, magnitude
from fp8lm.kernels.triton.tensor_table import (
    ALIGNMENT,
    TensorTable,
    block_scales,
    tensor_at,
)
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

CHUNK = 1 << 15  # elements of a program
_PER_THREAD, _WARPS = 16, 4
_COLUMNS = tl.constexpr(4)  # of the table: first program, elements, addresses of payload and scale
_PARTS = 256  # that the last launch adds up at once


class MultiTensorNorm:
    """Reduces many tensors; keeps the tables of where they are from step to step."""

    def __init__(self) -> None:
        self._tables: dict[Kind, TensorTable] = defaultdict(TensorTable)
        self._parts = TensorTable()

    def square_sums_and_amaxes(self, tensors: Sequence[ScaledTensor]) -> tuple[Tensor, Tensor]:
        """See `Kernels`. ValueError for a payload or scales that `Kind.of` refuses."""
        device = tensors[0].device
        squares = torch.empty(len(tensors), dtype=torch.float64, device=device)
        amaxes = torch.empty(len(tensors), device=device)
        alike: dict[Kind, list[int]] = defaultdict(list)
        for position, tensor in enumerate(tensors):
            alike[Kind.of(tensor)].append(position)
        counts = [triton.cdiv(tensor.payload.numel(), CHUNK) for tensor in tensors]
        partial_squares = squares.new_empty(sum(counts))
        partial_amaxes = torch.empty(sum(counts), dtype=torch.int32, device=device)
        first, parts = 0, [(0, 0)] * len(tensors)
        for kind, positions in alike.items():
            programs = [counts[position] for position in positions]
            for position in positions:
                parts[position] = (first, counts[position])
                first += counts[position]
            part = slice(first - sum(programs), first)
            members, table = [tensors[position] for position in positions], self._tables[kind]
            table.update([_row(tensor) for tensor in members], programs, device)
            _launch(kind, members, table, partial_squares[part], partial_amaxes[part])
        self._parts.update(parts, [1] * len(parts), device)
        launch(
            add_parts,
            (len(tensors),),
            self._parts.rows,
            partial_squares,
            partial_amaxes,
            squares,
            amaxes,
            reads=[self._parts.rows[:, 1:], partial_squares, partial_amaxes],
            writes=[squares, amaxes],
            PARTS=_PARTS,
        )
        return squares, amaxes


@dataclass(frozen=True)
class Kind:
    """What is the same for all tensors of a launch; `scale_block` 0: one scale for all elements."""

    fmt: Format
    scale_block: int
    is_aligned: bool

    @classmethod
    def of(cls, tensor: ScaledTensor) -> Kind:
        """That of `tensor`; ValueError for scales or payloads that do not lie one by one."""
        payload = tensor.payload
        if not payload.is_contiguous():
            raise ValueError("a sum over many tensors needs contiguous payloads")
        granularity, block = tensor.granularity, 0
        if not granularity.is_per_tensor:
            block = granularity.columns or tensor.shape[-1]
            if granularity.rows != 1 or tensor.shape[-1] % block:
                raise ValueError(f"scales {granularity} are not of consecutive elements")
        is_aligned = payload.data_ptr() % ALIGNMENT == payload.numel() % ALIGNMENT == 0
        return cls(tensor.format, block, is_aligned)


def _row(tensor: ScaledTensor) -> list[int]:
    return [tensor.payload.numel(), tensor.payload.data_ptr(), tensor.scale.data_ptr()]


def _launch(
    kind: Kind, tensors: list[ScaledTensor], table: TensorTable, squares: Tensor, amaxes: Tensor
) -> None:
    if not len(table.owners):
        return
    held = [tensor for tensor in tensors if tensor.payload.numel()]
    launch(
        square_sums,
        (len(table.owners),),
        table.rows,
        table.owners,
        squares,
        amaxes,
        reads=[
            *(x for tensor in held for x in (tensor.payload, tensor.scale)),
            *(table.rows[: len(held)], table.owners),
        ],
        writes=[squares, amaxes],
        FORMAT=kind.fmt.name,
        SCALE_BLOCK=kind.scale_block,
        ALIGNMENT=ALIGNMENT if kind.is_aligned else 1,
        CHUNK=CHUNK,
        BLOCK=_PER_THREAD * 32 * _WARPS,
        PER_THREAD=_PER_THREAD,
        num_warps=_WARPS,
    )


@triton.jit
def square_sums(
    table_ptr,
    owner_ptr,
    sum_ptr,
    amax_ptr,
    FORMAT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """The sum of squares and the bits of the amax of one chunk of one tensor."""
    row_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * _COLUMNS
    first = (tl.program_id(0) - tl.load(row_ptr)) * CHUNK
    numel = tl.multiple_of(tl.load(row_ptr + 1), ALIGNMENT)
    payload_ptr, scale_ptr = tensor_at(row_ptr + 2, FORMAT, ALIGNMENT)
    offsets = tl.arange(0, BLOCK)
    total, largest = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    if SCALE_BLOCK == 0:
        scale = tl.load(scale_ptr)
    for start in range(first, tl.minimum(first + CHUNK, numel), BLOCK):
        inside = offsets < numel - start
        value = decode(tl.load(payload_ptr + start + offsets, mask=inside, other=0), FORMAT)
        if SCALE_BLOCK != 0:
            scales = block_scales(scale_ptr, start, numel, SCALE_BLOCK, BLOCK, PER_THREAD)
            value = tl.math.div_rn(value, scales)
        elif FORMAT == "fp8_e2m5":  # whose scales are no powers of two
            value = tl.math.div_rn(value, tl.broadcast_to(scale, value.shape))
        elif fact(FORMAT, "scaled"):
            value = value * inverse_of(scale)
        if fact(FORMAT, "root"):
            value = value * value
        largest = tl.maximum(largest, magnitude(value))
        total += value.to(tl.float64) * value.to(tl.float64)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def add_parts(table_ptr, sums_ptr, amaxes_ptr, sum_ptr, amax_ptr, PARTS: tl.constexpr):
    """The sum and the amax of one tensor, from those of its chunks."""
    row_ptr = table_ptr + tl.program_id(0) * 3
    first, count = tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    index = tl.arange(0, PARTS)
    total, largest = tl.zeros((PARTS,), tl.float64), tl.zeros((PARTS,), tl.int32)
    for start in range(0, count, PARTS):
        inside = start + index < count
        total += tl.load(sums_ptr + first + start + index, mask=inside, other=0.0)
        part = tl.load(amaxes_ptr + first + start + index, mask=inside, other=0)
        largest = tl.maximum(largest, part)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0).to(tl.float32, bitcast=True))
