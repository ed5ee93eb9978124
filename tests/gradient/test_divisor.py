"""A mean over more replicas than there are summands: experts have fewer than the loss."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.groups import model_parallel_groups, node_groups
from fp8lm.gradient.fp8_sum import AutoScaler, Fp8Sum
from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.gradient.reduction import Fp32ReduceScatter
from fp8lm.numerics import E4M3, FP32
from tests.parallel.ranks import CPU, KERNELS, random

ROWS = [{"w": (0, 16)}, {"w": (16, 24), "b": (0, 8)}, {}, {"w": (24, 32)}]


def reduction(kind, groups, divisor):
    wire, group = Wire("grads", "fp8", WireCounter(("grads",))), groups.data_parallel
    if kind == "flat":
        return Fp32ReduceScatter(group, wire, KERNELS, divisor)
    if kind == "two hops":
        nodes = node_groups(groups, 2)
        return HierarchicalReduceScatter(group, nodes.node, nodes.across, wire, KERNELS, divisor)
    scaling = AutoScaler(["w"], group.size(), "automatic", CPU)
    return Fp8Sum(group, group, wire, KERNELS, scaling, divisor=divisor)


def reduce(kind, divisors):
    with model_parallel_groups() as groups:
        gradients = {
            "w": KERNELS.quantize(random(32, 16, seed=dist.get_rank()), E4M3),
            "b": KERNELS.quantize(random(8, seed=dist.get_rank()), FP32),
        }
        return [
            reduction(kind, groups, divisor).start(gradients, ROWS).wait() for divisor in divisors
        ]


@pytest.mark.parametrize("kind", ["flat", "two hops", "fp8_sum"])
def test_sums_are_divided_by_the_number_of_replicas_of_the_loss(kind, run_distributed):
    for by_default, by_four, by_eight in run_distributed(reduce, 4, kind, (None, 4, 8)):
        for name, mean in by_default.items():
            assert torch.equal(by_four[name], mean)
            assert torch.equal(by_eight[name], mean / 2)
