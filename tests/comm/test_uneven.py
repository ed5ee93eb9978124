"""Different amounts from every rank to all, and sums of FP8 codes for every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import all_gather_bytes, all_gather_uneven, reduce_scatter_fp8
from fp8lm.numerics import E4M3
from tests.comm.ranks import sent, wire

SIZES = {
    "equal": [32, 32, 32, 32],
    "unequal": [16, 0, 48, 5],
    "one": [0, 0, 0, 80],
    "none": [0] * 4,
}


def shard(rank, size):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def gather(sizes):
    rank, used = dist.get_rank(), wire()
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8)
    buffer.split(sizes)[rank].copy_(shard(rank, sizes[rank]))
    result = all_gather_uneven(buffer, sizes, dist.group.WORLD, used).wait()
    return result.data_ptr() == buffer.data_ptr(), buffer, sent(used)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_shard_arrives_where_it_belongs(sizes, run_distributed):
    expected = torch.cat([shard(rank, size) for rank, size in enumerate(sizes)])
    results = run_distributed(gather, 4, sizes)
    for in_place, buffer, _ in results:
        assert in_place and torch.equal(buffer, expected)
    # As in a ring: every byte is sent three times, by whoever it passes.
    assert sum(counted for *_, counted in results) == 3 * sum(sizes)


def codes(rank):
    """What rank `rank` has for each of four: nothing for the second."""
    x = [torch.full((size,), float(rank + owner)) for owner, size in enumerate((8, 0, 3, 16))]
    return [part.to(E4M3.dtype).view(torch.uint8) for part in x]


def add_up():
    """gloo adds up no FP8: what NCCL does is put in its place."""
    calls = []

    class Done:
        def wait(self):
            return True

    def reduce(part, *, group, group_dst, async_op):
        assert async_op and part.dtype == E4M3.dtype
        calls.append(group_dst)
        gathered = all_gather_bytes(part.view(torch.uint8), group, wire()).wait()
        if group.rank() == group_dst:
            total = gathered.view(E4M3.dtype).float().sum(0).to(E4M3.dtype)
            part.view(torch.uint8).copy_(total.view(torch.uint8))
        return Done()

    used, original = wire(), dist.reduce
    dist.reduce = reduce
    try:
        total = reduce_scatter_fp8(codes(dist.get_rank()), E4M3, dist.group.WORLD, used).wait()
    finally:
        dist.reduce = original
    return total.view(E4M3.dtype).float(), calls, sent(used)


def test_every_rank_gets_the_sum_of_its_own(run_distributed):
    for rank, (total, calls, counted) in enumerate(run_distributed(add_up, 4)):
        size = (8, 0, 3, 16)[rank]
        assert torch.equal(total, torch.full((size,), 0.0 + 1 + 2 + 3 + 4 * rank))
        assert calls == [0, 2, 3]
        assert counted == 27 - size
