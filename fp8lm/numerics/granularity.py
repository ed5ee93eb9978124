"""How many elements of a matrix share one scale.

    per tensor   one scale, 0-d                    FP8-LM's, and every state's
    per row      [R, 1]                            GEMM operands; pipeline messages: one per token
    1 x 128      [R, ceil(C/128)]                  GEMM operands (DeepSeek-V3's activations); sums
                                                   of weight gradients in E2M5
    128 x 128    [ceil(R/128), ceil(C/128)]        GEMM operands (DeepSeek-V3's weights)
    1 x 32       [R, ceil(C/32)]                   GEMM operands in MXFP8 (OCP): E8M0 scales

Rows and columns are those of an operand as a GEMM reads it, its contraction last. A power of two
(see `scaling`) is a number of E8M0, the eight bits of an exponent that MXFP8 keeps of a scale.

A scale has the shape that its granularity gives it, so that a tensor and its scales cannot be
mistaken for those of another granularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from fp8lm.numerics.formats import E2M5, Format

BLOCK = 128


@dataclass(frozen=True)
class Granularity:
    """Blocks of `rows` x `columns` elements of a matrix; None: the whole dimension."""

    rows: int | None
    columns: int | None

    @property
    def is_per_tensor(self) -> bool:
        """Whether the whole tensor, of any number of dimensions, has one scale."""
        return self.rows is None and self.columns is None

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`; ValueError unless it is a matrix."""
        if self.is_per_tensor:
            return ()
        if len(shape) != 2:
            raise ValueError(f"blocks are of a matrix, not of a tensor of shape {tuple(shape)}")
        sizes = zip(shape, (self.rows, self.columns), strict=True)
        return tuple(1 if block is None else -(-size // block) for size, block in sizes)

    @property
    def is_symmetric(self) -> bool:
        """Whether the transposed matrix has the same scales, transposed."""
        return self.rows == self.columns

    def transposed(self) -> Granularity:
        """The granularity of the transposed matrix."""
        return Granularity(self.columns, self.rows)

    def cuts(self, size: int, dim: int) -> bool:
        """Whether a part of `size` along `dim` (0: rows) ends inside a block."""
        block = (self.rows, self.columns)[dim]
        return block is not None and size % block != 0

    def spans(self, dim: int) -> bool:
        """Whether one scale is of the whole matrix along `dim` (0: rows)."""
        return (self.rows, self.columns)[dim] is None

    def max(self, magnitudes: Tensor) -> Tensor:
        """The largest of `magnitudes` [R, C] (none is negative) in every block; NaN wins."""
        rows, columns = magnitudes.shape
        r, c = self.rows or max(rows, 1), self.columns or max(columns, 1)
        if rows % r or columns % c:  # padding copies
            magnitudes = functional.pad(magnitudes, (0, -columns % c, 0, -rows % r))
        return magnitudes.unflatten(0, (-1, r)).unflatten(2, (-1, c)).amax(dim=(1, 3))

    def expand(self, scale: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """`scale` so that it multiplies a tensor of `shape` elementwise."""
        if self.is_per_tensor:
            return scale
        for dim, block in enumerate((self.rows, self.columns)):
            if block is not None and block != 1:
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, shape[dim])
        return scale

    def multiply_(self, x: Tensor, factors: Tensor) -> Tensor:
        """`x` times the factor of every block, in place."""
        rows, columns = x.shape
        r, c = self.rows or max(rows, 1), self.columns or max(columns, 1)
        if rows % r or columns % c or not x.is_contiguous():
            return x.mul_(self.expand(factors, x.shape))
        x.view(rows // r, r, columns // c, c).mul_(factors[:, None, :, None])
        return x

    def __str__(self) -> str:
        if self.is_per_tensor:
            return "per tensor"
        sizes = ("all" if size is None else str(size) for size in (self.rows, self.columns))
        return "blocks of {} x {}".format(*sizes)


PER_TENSOR = Granularity(None, None)
PER_ROW = Granularity(1, None)
BLOCK_1X128 = Granularity(1, BLOCK)
BLOCK_128X128 = Granularity(BLOCK, BLOCK)
MX_1X32 = Granularity(1, 32)


def granularity_by_name(name: str) -> Granularity:
    """The granularity a config value such as `block_1x128` names; KeyError if there is none."""
    return {
        "tensor": PER_TENSOR,
        "row": PER_ROW,
        "block_1x128": BLOCK_1X128,
        "block_128x128": BLOCK_128X128,
        "mx_1x32": MX_1X32,
    }[name]


def granularity_of(fmt: Format, shape: tuple[int, ...]) -> Granularity:
    """How a sum of gradients of `shape` in `fmt` is scaled: E2M5 per block of a row.

    Of the largest length up to 128 that divides the row, so that blocks of the matrix are blocks of
    its elements in memory, and a part of its rows has whole blocks.
    """
    return Granularity(1, gcd(shape[-1], BLOCK)) if fmt == E2M5 else PER_TENSOR
