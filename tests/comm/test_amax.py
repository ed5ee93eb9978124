"""The amax of a sharded tensor: what survives the reduction, and which group must reduce it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import all_gather, max_over_group
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.numerics import E4M3
from tests.comm.ranks import KERNELS, same_bits, sent, values, wire

NAN, INF = math.nan, math.inf


def reduce(amaxes):
    own, used = amaxes[dist.get_rank()], wire()
    before = own.clone()
    largest = max_over_group(own, dist.group.WORLD, used).wait()
    assert same_bits(own, before)
    return largest, sent(used)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_worst_of_any_rank_reaches_all(run_distributed, world_size):
    # Columns: finite, zeros of both signs, denormal, Inf, NaN, NaN against Inf, negative NaN.
    last = torch.tensor([3.0, -0.0, 1e-44, 7.0, 5.0, INF, 1.0])
    other = torch.tensor([2.0, 0.0, 0.0, INF, NAN, NAN, 2.0])
    last.view(torch.int32)[6] = 0xFFC00000 - (1 << 32)
    assert last.isnan()[6]
    amaxes = torch.stack([other] * (world_size - 1) + [last]).view(world_size, 1, 7)
    expected = torch.tensor([[3.0, 0.0, 1e-44, INF, NAN, NAN, NAN]])
    # A ring all-reduce of 28 bytes; the strided view is sent in order.
    expected_bytes = -(-2 * (world_size - 1) * 28 // world_size)
    strided = amaxes.transpose(1, 2).contiguous().transpose(1, 2)
    for batch in (amaxes, strided):
        for largest, counted in run_distributed(reduce, world_size, batch):
            torch.testing.assert_close(largest, expected, rtol=0, atol=0, equal_nan=True)
            assert counted == expected_bytes


def reduce_alone(amax):
    used = wire()
    with model_parallel_groups() as groups:
        return max_over_group(amax, groups.tensor_parallel, used).wait(), sent(used)


def test_a_group_of_one_sends_nothing(run_distributed):
    amax = torch.tensor([2.0, NAN])
    for largest, counted in run_distributed(reduce_alone, 2, amax):
        torch.testing.assert_close(largest, amax, rtol=0, atol=0, equal_nan=True)
        assert counted == 0


def test_only_fp32_is_taken():
    with pytest.raises(TypeError, match=r"amaxes are fp32, not torch\.bfloat16"):
        max_over_group(torch.ones(2, dtype=torch.bfloat16), None, wire())


def gather_with_amax_over(group_name):
    """2 x 2 ranks: each tensor-parallel pair gathers the tensor of its replica."""
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        shard, replica = groups.tensor_parallel.rank(), groups.data_parallel.rank()
        x = replica_tensor(replica).chunk(2)[shard]
        amax_group = getattr(groups, group_name)
        amax = max_over_group(KERNELS.amax(x), amax_group, wire()).wait()
        q = KERNELS.quantize(x, E4M3, amax=amax)
        return replica, all_gather(q, groups.tensor_parallel, wire()).wait()


def replica_tensor(replica):
    """The second half is larger, and so is the second replica."""
    return torch.cat([values(0, 16, 3), values(1, 16, 3, amplitude=20.0)]) * (1 + 9 * replica)


def differing(run_distributed, group_name):
    results = run_distributed(gather_with_amax_over, 4, group_name)
    assert [replica for replica, _ in results] == [0, 0, 1, 1]
    wholes = [KERNELS.quantize(replica_tensor(replica), E4M3) for replica in range(2)]
    return [
        rank
        for rank, (replica, gathered) in enumerate(results)
        if not same_bits(gathered.payload, wholes[replica].payload)
        or not same_bits(gathered.scale, wholes[replica].scale)
    ]


def test_the_group_of_the_shards_gives_the_bits_of_the_whole(run_distributed):
    assert differing(run_distributed, "tensor_parallel") == []


@pytest.mark.parametrize(
    ("group_name", "wrong"), [("data_parallel", [0, 1, 2, 3]), ("world", [0, 1])]
)
def test_a_wrong_group_is_caught(run_distributed, group_name, wrong):
    # Over the world the second replica, which holds the largest value, is right by chance.
    assert differing(run_distributed, group_name) == wrong
