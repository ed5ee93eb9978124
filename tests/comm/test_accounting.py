"""Wires count what they carry; the formulas are checked against every collective elsewhere."""

from __future__ import annotations

import pytest

from fp8lm.comm import Wire, WireCounter, accounting
from fp8lm.numerics import BF16, E4M3, E5M2, FP32


def test_counter_takes_and_starts_again():
    counter = WireCounter()
    gather, reduce = (Wire(name, "fp8", counter) for name in ("tp_gather", "tp_reduce"))
    for num_bytes in (3, 4):
        gather.count(num_bytes)
    reduce.count(5)
    zeros = dict.fromkeys(accounting.WIRES, 0)
    assert counter.sent == {**zeros, "tp_gather": 7, "tp_reduce": 5}
    assert counter.take() == {**zeros, "tp_gather": 7, "tp_reduce": 5}
    assert counter.sent == zeros


@pytest.mark.parametrize(
    ("precision", "formats"),
    [("fp8", [E4M3, E5M2]), ("bf16", [BF16] * 2), ("fp32", [FP32] * 2)],
)
def test_precision_decides_the_format(precision, formats):
    wire = Wire("grads", precision, WireCounter())
    assert [wire.format(fmt) for fmt in (E4M3, E5M2)] == formats


def test_unknown_wires_are_refused():
    with pytest.raises(KeyError, match="gradients"):
        Wire("gradients", "fp8", WireCounter())
    with pytest.raises(ValueError, match=r"wire grads carries one of .*, not fp4"):
        Wire("grads", "fp4", WireCounter())


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_rings_as_a_whole(world_size):
    ranks = range(world_size)
    for src in ranks:
        total = sum(accounting.broadcast_sent(world_size, rank, src, 10) for rank in ranks)
        assert total == 10 * (world_size - 1)  # everyone but the source receives it once
    # A ring all-reduce is a reduce-scatter and an all-gather of shards.
    shard = accounting.all_gather_sent(world_size, 5)
    assert accounting.all_reduce_sent(world_size, 5 * world_size) == 2 * shard
    assert accounting.all_reduce_sent(world_size, 1) in (0, 1, 2)
    assert accounting.all_to_all_sent(0, [7] + [5] * (world_size - 1)) == shard
