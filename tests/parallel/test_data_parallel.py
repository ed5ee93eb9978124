"""Two replicas of a tensor-parallel layout: what is shared stays within a tensor-parallel group."""

from __future__ import annotations

import torch

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.layers.linear import Linear
from fp8lm.layers.param import ParamSpec
from fp8lm.layers.quantizer import Quantizer
from fp8lm.numerics import BF16, E4M3
from fp8lm.parallel import TensorParallel
from tests.parallel.ranks import KERNELS, random, recipe


def shared():
    """(largest of the group's amaxes, scale of a gathered input, of a recast weight, a sum)."""
    with model_parallel_groups(ParallelDims(tp=2, dp=2)) as groups:
        counter = WireCounter(("tp_gather", "tp_reduce"))
        tp = TensorParallel(
            group=groups.tensor_parallel,
            sequence_parallel=True,
            gather_wire=Wire("tp_gather", "fp8", counter),
            reduce_wire=Wire("tp_reduce", "fp8", counter),
            kernels=KERNELS,
        )
        rank = groups.world.rank()
        mine = torch.tensor(2.0**rank)
        largest = tp.max(mine)
        sent = tp.replicated_side().wire_quantizer(Quantizer(E4M3, KERNELS), torch.float32)(
            torch.full((16, 16), 2.0**rank)
        )
        layer = Linear(
            ParamSpec((32, 16), None, BF16, E4M3, shard_spec=tp.shard(0)),
            recipe(tp, preset="te"),
            input_comm=tp.replicated_side(),
            output_comm=tp.sharded_side(),
        )
        layer.weight.payload.fill_(2.0**rank)
        operand = layer.weight.operand()
        total = [random(4, seed=rank)]
        tp.sum_in_place(total)
        return largest, sent.scale, operand.scale, total[0]


def test_amaxes_and_sums_stay_in_the_group(run_distributed):
    # Ranks 0 and 1 are one replica, 2 and 3 the other: amaxes 1, 2 | 4, 8; 448 / amax in binades.
    results = run_distributed(shared, 4)
    assert [largest.item() for largest, *_ in results] == [2.0, 2.0, 8.0, 8.0]
    assert [scale.item() for _, scale, _, _ in results] == [128.0, 128.0, 32.0, 32.0]
    assert [scale.item() for _, _, scale, _ in results] == [128.0, 128.0, 32.0, 32.0]
    for rank, (*_, total) in enumerate(results):
        first = rank // 2 * 2
        assert torch.equal(total, random(4, seed=first) + random(4, seed=first + 1))
