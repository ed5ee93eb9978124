"""Sums over ranks in eight bits: exactly the documented arithmetic, and how good that is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import all_gather, all_reduce, max_over_group, reduce_scatter
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32
from tests.comm.ranks import KERNELS, message_bytes, same_bits, sent, values, wire

FORMATS = [E4M3, E5M2, FP16, BF16, FP32]
WORLDS = [2, 4]
ROWS, COLUMNS = 8, 24  # rows of each shard
EQUAL = (1.0, 1.0, 1.0, 1.0)
UNEQUAL = (1e3, 1e-6, 0.0, 1.0)


def term(rank, world_size, amplitudes=EQUAL, dtype=torch.float32):
    return values(rank, world_size * ROWS, COLUMNS, amplitude=amplitudes[rank], dtype=dtype)


def scatter(fmt, amplitudes, dtype):
    rank, world_size, used = dist.get_rank(), dist.get_world_size(), wire()
    x = term(rank, world_size, amplitudes, dtype)
    before = x.clone()
    results = [reduce_scatter(x, fmt, dist.group.WORLD, used, KERNELS).wait() for _ in range(2)]
    assert same_bits(x, before)
    assert same_bits(*results), "not deterministic"
    return results[0], sent(used) // 2


def expected_shard(rank, world_size, fmt, amplitudes, dtype):
    """The arithmetic in one process: own term as it is, the others rounded, in rank order."""
    total = torch.zeros(ROWS, COLUMNS)
    for other in range(world_size):
        chunk = term(other, world_size, amplitudes, dtype).chunk(world_size)[rank]
        sent_chunk = chunk if other == rank else KERNELS.dequantize(KERNELS.quantize(chunk, fmt))
        total += sent_chunk
    return total


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize(
    ("amplitudes", "dtype"),
    [(EQUAL, torch.float32), (EQUAL, torch.bfloat16), (UNEQUAL, torch.float32)],
)
def test_reduce_scatter_is_the_sum_of_rounded_terms(
    run_distributed, world_size, fmt, amplitudes, dtype
):
    results = run_distributed(scatter, world_size, fmt, amplitudes, dtype)
    for rank, (total, counted) in enumerate(results):
        assert same_bits(total, expected_shard(rank, world_size, fmt, amplitudes, dtype))
        assert counted == (world_size - 1) * message_bytes(ROWS * COLUMNS, fmt)


def exact_sum(world_size, amplitudes=EQUAL):
    return sum(term(rank, world_size, amplitudes).double() for rank in range(world_size))


def snr_db(result, exact):
    return 10 * math.log10(exact.square().sum() / (result - exact).square().sum())


# Rounding to m bits of mantissa leaves 12 (7/3) 4^m of the power of values spread evenly over a
# binade, 31 to 32 dB for m = 3, 25 to 26 for m = 2, whatever the number of terms; a rank's own
# term adds no noise, which is worth W / (W - 1). An all-reduce rounds once more.
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("fmt", "bound"), [(E4M3, 31.0), (E5M2, 25.0), (BF16, 54.0)], ids=repr)
def test_signal_to_noise(run_distributed, world_size, fmt, bound):
    exact = exact_sum(world_size)
    scattered = run_distributed(scatter, world_size, fmt, EQUAL, torch.float32)
    own_term = 10 * math.log10(world_size / (world_size - 1))
    assert snr_db(torch.cat([total for total, _ in scattered]), exact) >= bound + own_term
    reduced, _ = run_distributed(reduce, world_size, fmt, EQUAL)[0]
    assert snr_db(reduced, exact) >= bound - 3.5


@pytest.mark.parametrize("world_size", WORLDS)
def test_fp32_wire_is_exact_to_the_rounding_of_the_sum(run_distributed, world_size):
    exact = exact_sum(world_size, UNEQUAL)
    results = run_distributed(scatter, world_size, FP32, UNEQUAL, torch.float32)
    total = torch.cat([shard for shard, _ in results]).double()
    magnitude = sum(term(rank, world_size, UNEQUAL).abs() for rank in range(world_size)).double()
    assert ((total - exact).abs() <= world_size * 2.0**-24 * magnitude).all()


def reduce(fmt, amplitudes, shape=None):
    rank, world_size, used = dist.get_rank(), dist.get_world_size(), wire()
    x = term(rank, world_size, amplitudes)
    x = x if shape is None else x.view(-1)[: math.prod(shape)].view(shape)
    results = [all_reduce(x, fmt, dist.group.WORLD, used, KERNELS).wait() for _ in range(2)]
    assert same_bits(*results), "not deterministic"
    return results[0], sent(used) // 2


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", [(4, 24), (5, 3, 3), (1,)])  # the last two are padded
def test_all_reduce_has_the_same_bits_everywhere(run_distributed, world_size, fmt, shape):
    numel = math.prod(shape)
    padding = -numel % world_size
    flat = [term(rank, world_size, UNEQUAL).view(-1)[:numel] for rank in range(world_size)]
    chunks = [torch.cat([x, torch.zeros(padding)]).chunk(world_size) for x in flat]
    shards = []
    for owner in range(world_size):
        total = torch.zeros_like(chunks[0][0])
        for rank in range(world_size):
            x = chunks[rank][owner]
            total += x if rank == owner else KERNELS.dequantize(KERNELS.quantize(x, fmt))
        shards.append(KERNELS.dequantize(KERNELS.quantize(total, fmt)))
    expected = torch.cat(shards)[:numel].view(shape)
    for result, counted in run_distributed(reduce, world_size, fmt, UNEQUAL, shape):
        assert same_bits(result, expected)
        shard = (numel + padding) // world_size
        assert counted == 2 * (world_size - 1) * message_bytes(shard, fmt)


def result_dtypes(precision):
    x = term(dist.get_rank(), dist.get_world_size(), dtype=torch.bfloat16)
    used = wire(precision)
    results = [
        function(x, used.format(E4M3), dist.group.WORLD, used, KERNELS, dtype=dtype).wait()
        for function in (reduce_scatter, all_reduce)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert same_bits(results[1], results[0].bfloat16())
    assert same_bits(results[3], results[2].bfloat16())
    return sent(used)


@pytest.mark.parametrize("world_size", WORLDS)
def test_wire_precision_and_bytes_saved(run_distributed, world_size):
    fp8, bf16, fp32 = (
        run_distributed(result_dtypes, world_size, precision)
        for precision in ("fp8", "bf16", "fp32")
    )
    assert fp32 == [2 * num_bytes for num_bytes in bf16]
    message = message_bytes(ROWS * COLUMNS, E4M3)
    assert fp8 == [6 * (world_size - 1) * message] * world_size  # 2 scatters, 2 * 2 all-reduce


def bytes_of_a_layer(precision):
    """Each collective once with 64 x 64 elements of each rank, far fewer than a layer has."""
    used = wire(precision)
    shard, fmt = values(0, 64, 64), used.format(E4M3)
    amax = KERNELS.amax(shard)
    if fmt.scaled:
        amax = max_over_group(amax, dist.group.WORLD, used).wait()
    all_gather(KERNELS.quantize(shard, fmt, amax=amax), dist.group.WORLD, used).wait()
    x = values(0, 64 * dist.get_world_size(), 64, dtype=torch.bfloat16)
    reduce_scatter(x, used.format(E4M3), dist.group.WORLD, used, KERNELS).wait()
    all_reduce(x, used.format(E4M3), dist.group.WORLD, used, KERNELS).wait()
    return sent(used)


@pytest.mark.parametrize("world_size", WORLDS)
def test_at_least_49_percent_fewer_bytes_than_bf16(run_distributed, world_size):
    fp8, bf16 = (run_distributed(bytes_of_a_layer, world_size, p)[0] for p in ("fp8", "bf16"))
    assert fp8 <= 0.51 * bf16


def spoil(fmt, event, bad_rank, destination):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = term(rank, world_size)
    if rank == bad_rank:
        x[destination * ROWS + 3, 5] = event
    arguments = (x, fmt, dist.group.WORLD, wire(), KERNELS)
    return reduce_scatter(*arguments).wait(), all_reduce(*arguments).wait()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, BF16], ids=repr)
def test_a_bad_value_reaches_every_rank_it_is_sent_to(run_distributed, world_size, event, fmt):
    destination = 0
    results = run_distributed(spoil, world_size, fmt, event, 1, destination)
    for rank, (scattered, reduced) in enumerate(results):
        if rank != destination:
            assert scattered.isfinite().all()
        elif fmt.scaled:
            assert scattered.isnan().all()
        else:
            assert (~scattered.isfinite()).nonzero().tolist() == [[3, 5]]
        bad = ~reduced.isfinite()
        assert bad[destination * ROWS + 3, 5]
        assert bad.sum() == (ROWS * COLUMNS if fmt.scaled else 1)
        assert same_bits(reduced, results[0][1])


def test_a_bad_value_in_a_ranks_own_rows_stays_visible(run_distributed):
    results = run_distributed(spoil, 2, E4M3, math.nan, 1, 1)
    assert results[0][0].isfinite().all()
    assert results[1][0].isnan().any()
    assert all(reduced[ROWS:].isnan().all() for _, reduced in results)


def zeros_everywhere(fmt):
    x = torch.zeros(4, 3)
    arguments = (x, fmt, dist.group.WORLD, wire(), KERNELS)
    return reduce_scatter(*arguments).wait(), all_reduce(*arguments).wait()


@pytest.mark.parametrize("fmt", [E4M3, BF16], ids=repr)
def test_zeros_sum_to_zeros(run_distributed, fmt):
    for scattered, reduced in run_distributed(zeros_everywhere, 2, fmt):
        assert same_bits(scattered, torch.zeros(2, 3))
        assert same_bits(reduced, torch.zeros(4, 3))


def small_beside_large(fmt):
    """Rank 0 sends 1e3 in even columns, rank 1 sends 1e-6 in odd ones."""
    rank = dist.get_rank()
    x = torch.zeros(2, COLUMNS)
    x[:, rank::2] = values(rank, 2, COLUMNS // 2, amplitude=UNEQUAL[rank]).abs() + UNEQUAL[rank]
    return x, reduce_scatter(x, fmt, dist.group.WORLD, wire(), KERNELS).wait()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
def test_small_terms_survive_beside_large_ones(run_distributed, fmt):
    results = run_distributed(small_beside_large, 2, fmt)
    exact = sum(x for x, _ in results)
    total = torch.cat([shard for _, shard in results])
    # Half a unit in the last place, relative to each element: none is lost to another's scale.
    assert ((total - exact).abs() <= 2.0 ** -(fmt.mantissa_bits + 1) * exact).all()


def alone(fmt):
    with model_parallel_groups() as groups:
        x, used = term(0, 3, dtype=torch.bfloat16), wire()
        arguments = (x, fmt, groups.tensor_parallel, used, KERNELS)
        results = [reduce_scatter(*arguments).wait(), all_reduce(*arguments).wait()]
        return [same_bits(result, x.float()) for result in results], sent(used)


def test_a_group_of_one_rounds_and_sends_nothing(run_distributed):
    assert run_distributed(alone, 2, E4M3) == [([True, True], 0)] * 2


def uneven():
    x = torch.ones(5, 2)
    with pytest.raises(ValueError, match="5 rows cannot be scattered evenly over 2 ranks"):
        reduce_scatter(x, E4M3, dist.group.WORLD, wire(), KERNELS)


def test_rows_that_do_not_divide_are_refused(run_distributed):
    run_distributed(uneven, 2)
