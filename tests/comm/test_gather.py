"""All-gather and broadcast: bytes and scales arrive as they left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import (
    MessageLayout,
    all_gather,
    all_gather_bytes,
    all_gather_values,
    all_to_all_bytes,
    broadcast,
    max_over_group,
)
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32
from fp8lm.scaled_tensor import ScaledTensor
from tests.comm.ranks import KERNELS, message_bytes, same_bits, sent, values, wire

FORMATS = [E4M3, E5M2, FP16, BF16, FP32]
WORLDS = [2, 4]
ROWS, COLUMNS = 6, 5


def amplitude(rank):
    return (1e3, 1e-6, 0.0, 1.0)[rank]


def shard(rank, bad_rank=None):
    """Ranks differ by 9 orders of magnitude, and one has only zeros."""
    x = values(rank, ROWS, COLUMNS, amplitude=amplitude(rank))
    if rank == bad_rank:
        x[2, 3] = math.inf
    return x


def gather_all_formats(bad_rank=None):
    results = []
    for fmt in FORMATS:
        used, x = wire(), shard(dist.get_rank(), bad_rank)
        amax = max_over_group(KERNELS.amax(x), dist.group.WORLD, wire()).wait()
        q = KERNELS.quantize(x, fmt, amax=amax)
        results.append((all_gather(q, dist.group.WORLD, used).wait(), sent(used)))
    return results


@pytest.mark.parametrize("world_size", WORLDS)
def test_shard_then_quantize_is_quantize_then_shard(run_distributed, world_size):
    whole = torch.cat([shard(rank) for rank in range(world_size)])
    for results in run_distributed(gather_all_formats, world_size):
        for fmt, (gathered, counted) in zip(FORMATS, results, strict=True):
            expected = KERNELS.quantize(whole, fmt)
            assert gathered.format == fmt
            assert same_bits(gathered.payload, expected.payload)
            assert same_bits(gathered.scale, expected.scale)
            assert counted == (world_size - 1) * ROWS * COLUMNS * fmt.bytes


@pytest.mark.parametrize("world_size", WORLDS)
def test_inf_on_one_rank_is_nan_on_all(run_distributed, world_size):
    for results in run_distributed(gather_all_formats, world_size, 1):
        for gathered, _ in results:
            decoded = KERNELS.dequantize(gathered)
            if gathered.format.scaled:
                assert decoded.isnan().all()
            else:
                assert (~decoded.isfinite()).nonzero().tolist() == [[ROWS + 2, 3]]


def gather_values_in_all_formats(bad_rank=None):
    results = []
    for fmt in FORMATS:
        used = wire()
        q = KERNELS.quantize(shard(dist.get_rank(), bad_rank), fmt)
        gathered = all_gather_values(q, dist.group.WORLD, used).wait()
        results.append((gathered, KERNELS.join(gathered, torch.float32), sent(used)))
    return results


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("bad_rank", [None, 1])
def test_values_keep_the_scale_of_their_rank(run_distributed, world_size, bad_rank):
    for results in run_distributed(gather_values_in_all_formats, world_size, bad_rank):
        for fmt, (gathered, joined, counted) in zip(FORMATS, results, strict=True):
            expected = [KERNELS.quantize(shard(rank, bad_rank), fmt) for rank in range(world_size)]
            for q, e in zip(gathered, expected, strict=True):
                assert same_bits(q.payload, e.payload)
                assert same_bits(q.scale, e.scale)
            assert same_bits(joined, torch.cat([KERNELS.dequantize(e) for e in expected]))
            assert counted == (world_size - 1) * message_bytes(ROWS * COLUMNS, fmt)


def broadcast_from(src, bad_rank=None):
    rank, results = dist.get_rank(), []
    for fmt in FORMATS:
        used, own = wire(), KERNELS.quantize(shard(rank, bad_rank), fmt)
        before = own.clone()
        arrived = broadcast(own, src, dist.group.WORLD, used).wait()
        assert same_bits(own.payload, before.payload)
        results.append((arrived, sent(used)))
    return results


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("src", "bad_rank"), [(0, None), (1, None), (1, 1)])
def test_broadcast(run_distributed, world_size, src, bad_rank):
    results = run_distributed(broadcast_from, world_size, src, bad_rank)
    for rank, by_format in enumerate(results):
        for fmt, (arrived, counted) in zip(FORMATS, by_format, strict=True):
            expected = KERNELS.quantize(shard(src, bad_rank), fmt)
            assert same_bits(arrived.payload, expected.payload)
            assert same_bits(arrived.scale, expected.scale)
            last_of_the_ring = (rank + 1) % world_size == src
            assert counted == (0 if last_of_the_ring else message_bytes(ROWS * COLUMNS, fmt))


def broadcast_in_pairs():
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        x = KERNELS.quantize(shard(dist.get_rank()), E4M3)
        return broadcast(x, 1, groups.tensor_parallel, wire()).wait()


def test_the_source_is_counted_within_the_group(run_distributed):
    results = run_distributed(broadcast_in_pairs, 4)
    for arrived, src in zip(results, (1, 1, 3, 3), strict=True):
        assert same_bits(arrived.payload, KERNELS.quantize(shard(src), E4M3).payload)


def gather_alone():
    with model_parallel_groups() as groups:
        group, used = groups.tensor_parallel, wire()
        x = KERNELS.quantize(shard(0), E4M3)
        whole = all_gather(x, group, used).wait()
        (value,) = all_gather_values(x, group, used).wait()
        arrived = broadcast(x, 0, group, used).wait()
        buffer = torch.zeros(1, 30, dtype=torch.uint8)
        all_gather_bytes(x.payload.view(-1), group, used, out=buffer).wait()
        pieces = all_to_all_bytes(x.payload.view(-1), [30], [30], group, used).wait()
        same = [same_bits(q.payload, x.payload) for q in (whole, value, arrived)]
        return same, [same_bits(b, x.payload.view(-1)) for b in (pieces[0], buffer[0])], sent(used)


def test_a_group_of_one_sends_nothing(run_distributed):
    assert run_distributed(gather_alone, 2) == [([True] * 3, [True] * 2, 0)] * 2


def gather_weights_in_place():
    """Each rank owns two tensors of one buffer that all tensors of all ranks are views into."""
    rank, world_size, used = dist.get_rank(), dist.get_world_size(), wire()
    layout = MessageLayout((((4, 8), E4M3), ((3,), BF16)))
    buffer = torch.zeros(world_size, layout.nbytes, dtype=torch.uint8)
    weights = [layout.views(row) for row in buffer]
    for step in range(2):
        for weight in weights[rank]:
            new = values(10 * step + rank, *weight.shape, amplitude=10.0**rank)
            weight.copy_(KERNELS.quantize(new, weight.format))
        gathered = all_gather_bytes(buffer[rank], dist.group.WORLD, used, out=buffer).wait()
        assert gathered is buffer
    assert sent(used) == 2 * (world_size - 1) * layout.nbytes
    return weights


@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_in_place_reaches_the_views(run_distributed, world_size):
    for weights in run_distributed(gather_weights_in_place, world_size):
        for owner in range(world_size):
            for weight in weights[owner]:
                new = values(10 + owner, *weight.shape, amplitude=10.0**owner)
                expected = KERNELS.quantize(new, weight.format)
                assert same_bits(weight.payload, expected.payload)
                assert same_bits(weight.scale, expected.scale)


def exchange():
    """Rank s sends s + 2 d bytes of value 10 s + d to rank d."""
    rank, ranks, used = dist.get_rank(), range(dist.get_world_size()), wire()
    send = torch.cat([torch.full((rank + 2 * d,), 10 * rank + d, dtype=torch.uint8) for d in ranks])
    sizes, expected = [rank + 2 * d for d in ranks], [s + 2 * rank for s in ranks]
    received = all_to_all_bytes(send, sizes, expected, dist.group.WORLD, used).wait()
    assert sent(used) == sum(sizes) - sizes[rank]
    return [piece.tolist() for piece in received]


@pytest.mark.parametrize("world_size", WORLDS)
def test_uneven_exchange(run_distributed, world_size):
    for rank, received in enumerate(run_distributed(exchange, world_size)):
        assert received == [[10 * s + rank] * (s + 2 * rank) for s in range(world_size)]


def misuse():
    x = KERNELS.quantize(shard(dist.get_rank()), E4M3)
    scalar = ScaledTensor(x.payload.view(-1)[0], x.scale, E4M3)
    with pytest.raises(ValueError, match="needs a first dimension"):
        all_gather(scalar, dist.group.WORLD, wire())
    with pytest.raises(ValueError, match="rank 2 does not exist in a group of 2"):
        broadcast(x, 2, dist.group.WORLD, wire())
    with pytest.raises(ValueError, match=r"2 x 30 bytes do not fit \(2, 31\)"):
        out = torch.zeros(2, 31, dtype=torch.uint8)
        all_gather_bytes(x.payload.view(-1), dist.group.WORLD, wire(), out=out)


def test_misuse_is_refused(run_distributed):
    run_distributed(misuse, 2)
