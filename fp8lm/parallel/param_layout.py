"""Which data-parallel rank owns which rows of which weight (ZeRO); one scale per whole tensor.

    tensor   whole tensors, largest first, each to the rank with the least so far (FP8-LM,
             arXiv 2310.18313, Algorithm 1); balanced while there are many more tensors than ranks
    even     every rank the same number of bytes, tensors cut between rows

A tensor that is sharded keeps its one scale. The ranks' shards follow each other in one buffer, in
which every tensor is contiguous, cut or not:

    rank 0 [ a | b | c.. ] rank 1 [ ..c | d ] rank 2 ...

The weights may be in several parts, with a buffer each. Whole tensors have the same owners then as
in one part; row blocks are cut in every part, so that each rank has as many bytes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

ALIGNMENT = 16


@dataclass(frozen=True)
class BufferEntry:
    """A tensor of the buffer: `rows` (first dimension) of `columns` elements of `itemsize` bytes.

    `itemsize` is that of the model parameter, which is all-gathered.
    """

    name: str
    rows: int
    columns: int
    itemsize: int

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.rows * self.columns

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.columns * self.itemsize

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class ParamLayout:
    """Where each tensor starts in the buffer (`start`, bytes), and which `rows` a rank owns.

    `shard_bytes[rank]` is the size of its shard. `rows[rank][name]` is a half-open interval; names
    of which a rank owns no row are missing.
    """

    shard_bytes: Sequence[int]
    start: Mapping[str, int]
    rows: Sequence[Mapping[str, tuple[int, int]]]

    @property
    def num_ranks(self) -> int:
        """Number of owners."""
        return len(self.rows)


def assign_whole_tensors(
    parts: Sequence[Sequence[BufferEntry]], num_ranks: int
) -> list[ParamLayout]:
    """Algorithm 1 of the paper over all `parts` together; within a shard tensors keep their order.

    Sizes are elements: a rank that owns one holds the same bytes of states for it, whatever the
    weight is stored in.
    """
    loads = [0] * num_ranks
    owner = {}
    tensors = [tensor for part in parts for tensor in part]
    for tensor in sorted(tensors, key=lambda tensor: -tensor.numel):  # stable
        rank = loads.index(min(loads))
        owner[tensor.name] = rank
        loads[rank] += tensor.numel
    return [_whole(part, owner, num_ranks) for part in parts]


def _whole(tensors: Sequence[BufferEntry], owner: Mapping[str, int], num_ranks: int) -> ParamLayout:
    shard_bytes = [0] * num_ranks
    within: dict[str, int] = {}
    rows: list[dict[str, tuple[int, int]]] = [{} for _ in range(num_ranks)]
    for tensor in tensors:
        rank = owner[tensor.name]
        within[tensor.name] = shard_bytes[rank]
        rows[rank][tensor.name] = (0, tensor.rows)
        shard_bytes[rank] += _padded(tensor.nbytes, ALIGNMENT)
    first = [0, *accumulate(shard_bytes)]
    start = {name: first[owner[name]] + offset for name, offset in within.items()}
    return ParamLayout(shard_bytes, start, rows)


def shard_rows(parts: Sequence[Sequence[BufferEntry]], num_ranks: int) -> list[ParamLayout]:
    """Equal shards of every part, so that one all-gather suffices."""
    return [_cut(part, num_ranks) for part in parts]


def _cut(tensors: Sequence[BufferEntry], num_ranks: int) -> ParamLayout:
    # A shard is a multiple of every row's bytes, so that no boundary cuts a row.
    ordered = sorted(tensors, key=lambda tensor: -tensor.row_bytes)
    unit = math.lcm(ALIGNMENT, *(tensor.row_bytes for tensor in ordered))
    start, end = {}, 0
    for tensor in ordered:
        start[tensor.name] = _padded(end, math.lcm(ALIGNMENT, tensor.row_bytes))
        end = start[tensor.name] + tensor.nbytes
    shard_size = _padded(-(-end // num_ranks), unit)
    rows: list[dict[str, tuple[int, int]]] = [{} for _ in range(num_ranks)]
    for tensor in ordered:
        first, end = start[tensor.name], start[tensor.name] + tensor.nbytes
        for rank in range(first // shard_size, -(-end // shard_size)):
            low, high = max(rank * shard_size, first), min((rank + 1) * shard_size, end)
            width = tensor.row_bytes
            rows[rank][tensor.name] = ((low - first) // width, (high - first) // width)
    return ParamLayout([shard_size] * num_ranks, start, rows)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
