"""Which part of a logical tensor a rank holds.

A tensor has `num_sections` equal sections along `dim` (the gate and up halves of a gated MLP), each
sharded separately over `size` ranks:

    [gate | up], size 2:    rank 0: [gate_0 | up_0]     rank 1: [gate_1 | up_1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8lm.kernels.rounding import ElementIndex

Rows = tuple[int, int]  # along the first dimension: the first, and one beyond the last
LocalShards = Mapping[str, Rows]  # of a rank's part of each parameter, by name


@dataclass(frozen=True)
class ShardSpec:
    """Rank `rank` of `size` along `dim`, each of `num_sections` sections cut separately."""

    dim: int = 0
    num_sections: int = 1
    rank: int = 0
    size: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether one rank holds everything."""
        return self.size == 1

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this rank's part of a tensor of `shape`; ValueError if it does not divide."""
        if self.is_whole:
            return tuple(shape)
        if shape[self.dim] % (self.num_sections * self.size):
            raise ValueError(f"dimension {self.dim} of {shape} does not divide as {self}")
        return tuple(n // self.size if d == self.dim else n for d, n in enumerate(shape))

    def take(self, full: Tensor) -> Tensor:
        """This rank's part of the logical tensor `full`, contiguous."""
        if self.is_whole:
            return full
        sections = full.chunk(self.num_sections, self.dim)
        blocks = [section.chunk(self.size, self.dim)[self.rank] for section in sections]
        return torch.cat(blocks, self.dim)

    def element_index(self, shape: tuple[int, ...], first: int = 0) -> ElementIndex:
        """Numbers, in the logical tensor of `shape`, this rank's elements from `first` on."""
        inner = math.prod(shape[self.dim + 1 :])
        block = shape[self.dim] // (self.num_sections * self.size)
        return ElementIndex(first, block, inner, self.rank, self.size)

    def sections(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How a checkpoint sees the tensor, as one block per rank: (global shape, offset).

        With several parts the split dimension becomes two, [parts, n / parts].
        """
        tail = shape[self.dim + 1 :]
        whole = self._with_parts(shape)
        rows = whole[len(whole) - len(tail) - 1] // self.size
        offset = (0,) * (len(whole) - len(tail) - 1) + (rows * self.rank,)
        return whole, (*offset, *(0,) * len(tail))

    def as_block(self, local: Tensor) -> Tensor:
        """This rank's part `local` as the block that `sections` describes, a view."""
        return local.view(self._with_parts(tuple(local.shape)))

    def _with_parts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.num_sections == 1:
            return tuple(shape)
        rows = shape[self.dim] // self.num_sections
        return (*shape[: self.dim], self.num_sections, rows, *shape[self.dim + 1 :])


REPLICATED = ShardSpec()
