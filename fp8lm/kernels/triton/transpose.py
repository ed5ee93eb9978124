"""The transposed copy of a payload, tile by tile: reads and writes are of whole rows of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.cast import TILE, tiles
from fp8lm.kernels.triton.launch import launch


def transpose(payload: Tensor) -> Tensor:
    """[R,C] uint8 -> [C,R], contiguous."""
    payload = payload.contiguous()
    rows, columns = payload.shape
    transposed = torch.empty(columns, rows, dtype=payload.dtype, device=payload.device)
    launch(
        transpose_tile,
        tiles(rows, columns),
        payload,
        transposed,
        rows,
        columns,
        reads=[payload],
        writes=[transposed],
        TILE=TILE,
        num_warps=8,
    )
    return transposed


@triton.jit
def transpose_tile(payload_ptr, transposed_ptr, num_rows, num_columns, TILE: tl.constexpr):
    """The kernel of `transpose`."""
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    codes = tl.load(
        payload_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=inside
    )
    inside = (columns < num_columns)[:, None] & (rows < num_rows)[None, :]
    place = columns.to(tl.int64)[:, None] * num_rows + rows[None, :]
    tl.store(transposed_ptr + place, tl.trans(codes), mask=inside)
