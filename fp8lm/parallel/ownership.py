"""Which data-parallel rank owns which rows of which weight: ZeRO without cutting scales apart.

    tensor   whole tensors, largest first, each to the rank with the least so far (FP8-LM,
             arXiv 2310.18313, Algorithm 1); balanced while there are many more tensors than ranks
    even     every rank the same number of bytes, tensors cut between rows

A tensor that is cut keeps its one scale. The owners' slabs follow each other in one buffer, in
which every tensor is contiguous, cut or not:

    rank 0 [ a | b | c.. ] rank 1 [ ..c | d | padding ] rank 2 ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 16


@dataclass(frozen=True)
class Tensor2D:
    """What is placed: `rows` rows (the first dimension) of `row_bytes` each."""

    name: str
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Ownership:
    """`start[name]`: byte in the buffer; `rows[rank][name]`: first and last row (exclusive).

    Every slab has `slab_bytes`; a rank without rows of a tensor does not name it.
    """

    slab_bytes: int
    start: Mapping[str, int]
    rows: Sequence[Mapping[str, tuple[int, int]]]

    @property
    def num_ranks(self) -> int:
        """Number of owners."""
        return len(self.rows)

    def load(self, sizes: Mapping[str, int]) -> list[int]:
        """Elements each rank owns, where a row of tensor `name` has `sizes[name]` of them."""
        return [
            sum((stop - start) * sizes[name] for name, (start, stop) in own.items())
            for own in self.rows
        ]


def whole_tensors(tensors: Sequence[Tensor2D], num_ranks: int) -> Ownership:
    """Algorithm 1 of the paper; within a slab tensors keep their order."""
    loads = [0] * num_ranks
    owner = {}
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):  # stable
        rank = loads.index(min(loads))
        owner[tensor.name] = rank
        loads[rank] += _padded(tensor.nbytes, ALIGNMENT)
    slab = max(loads)
    start, rows = {}, [{} for _ in range(num_ranks)]
    filled = [rank * slab for rank in range(num_ranks)]
    for tensor in tensors:
        rank = owner[tensor.name]
        start[tensor.name] = filled[rank]
        rows[rank][tensor.name] = (0, tensor.rows)
        filled[rank] += _padded(tensor.nbytes, ALIGNMENT)
    return Ownership(slab, start, rows)


def row_blocks(tensors: Sequence[Tensor2D], num_ranks: int) -> Ownership:
    """Equal slabs. Their size is a multiple of every row's, so that no boundary cuts a row."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.row_bytes)
    unit = math.lcm(ALIGNMENT, *(tensor.row_bytes for tensor in ordered))
    start, end = {}, 0
    for tensor in ordered:
        start[tensor.name] = _padded(end, math.lcm(ALIGNMENT, tensor.row_bytes))
        end = start[tensor.name] + tensor.nbytes
    slab = _padded(-(-end // num_ranks), unit)
    rows: list[dict[str, tuple[int, int]]] = [{} for _ in range(num_ranks)]
    for tensor in ordered:
        for rank, own in enumerate(rows):
            low = max(rank * slab, start[tensor.name])
            high = min((rank + 1) * slab, start[tensor.name] + tensor.nbytes)
            if low < high:
                own[tensor.name] = tuple(
                    (byte - start[tensor.name]) // tensor.row_bytes for byte in (low, high)
                )
    return Ownership(slab, start, rows)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
