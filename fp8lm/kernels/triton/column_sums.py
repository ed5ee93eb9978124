"""The end of sums over the rows of a matrix: of what programs have added up, in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch

_COLUMNS, _ROWS = 64, 32  # of a program, and of what it reads at once


def add_over_programs(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [n, programs, C] -> [n, C], summed in fp32 and rounded to `dtype`."""
    count, programs, columns = sums.shape
    total = torch.empty(count, columns, dtype=dtype, device=sums.device)
    launch(
        add_rows,
        (max(1, triton.cdiv(columns, _COLUMNS)), count),
        sums,
        total,
        programs,
        columns,
        reads=[sums],
        writes=[total],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return total


@triton.jit
def add_rows(sums_ptr, total_ptr, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The kernel of `add_over_programs`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows, inside = tl.arange(0, ROWS), columns < num_columns
    sums_ptr += tl.program_id(1).to(tl.int64) * num_rows * num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        place = (start + rows).to(tl.int64)[:, None] * num_columns + columns[None, :]
        is_read = (start + rows < num_rows)[:, None] & inside[None, :]
        total += tl.load(sums_ptr + place, mask=is_read, other=0.0)
    total = tl.sum(total, axis=0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + tl.program_id(1) * num_columns + columns, total, mask=inside)
