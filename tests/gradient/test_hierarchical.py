"""Two hops, within and between nodes, against the flat reduction; bytes of each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.groups import model_parallel_groups, node_groups
from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.gradient.reduction import Fp32ReduceScatter
from fp8lm.numerics import BF16, E2M5, E4M3, FP32, granularity_of
from fp8lm.runtime.errors import InputError
from tests.parallel.ranks import KERNELS, random

ROWS = [{"w": (0, 16), "b": (0, 8)}, {"w": (16, 40)}, {"v": (0, 16)}, {"w": (40, 64)}]


def quantize(x, fmt):
    return KERNELS.quantize(x, fmt, granularity=granularity_of(fmt, x.shape))


def reduce(fmt, names="wbv"):
    with model_parallel_groups() as groups:
        nodes = node_groups(groups, 2)
        rank = dist.get_rank()
        assert (nodes.node.rank(), nodes.across.rank()) == (rank % 2, rank // 2)
        wire = Wire("grads", "fp8", WireCounter(("grads",)))
        gradients = {
            "w": quantize(random(64, 32, seed=rank), fmt),
            "b": KERNELS.quantize(random(8, seed=10 + rank), FP32),
            "v": quantize(random(16, 16, seed=20 + rank) * 2.0**rank, fmt),
        }
        gradients = {name: gradients[name] for name in names}
        sent = []
        for reduction in (
            Fp32ReduceScatter(groups.data_parallel, wire, KERNELS),
            HierarchicalReduceScatter(
                groups.data_parallel, nodes.node, nodes.across, wire, KERNELS
            ),
        ):
            means = reduction.start(gradients, ROWS).wait()
            sent.append((means, wire.counter.take()["grads"]))
        return sent


# One rounding of a sum of two, E4M3's 2^-4 at most for each element, E2M5's 2^-6 of the largest
# elements of a block.
@pytest.mark.parametrize(
    ("fmt", "bound"), [(FP32, 1e-6), (BF16, 2.0**-8), (E4M3, 2.0**-4), (E2M5, 2.0**-6)]
)
def test_two_hops_give_the_mean_of_one(fmt, bound, run_distributed):
    for (flat, _), (two, _) in run_distributed(reduce, 4, fmt):
        assert list(flat) == list(two)
        for name, mean in flat.items():
            error = (two[name] - mean).norm() / mean.norm()
            assert error < (1e-6 if name == "b" else bound), name
            assert two[name].shape == mean.shape


def stored(rank, fmt=E4M3):
    """Rank's gradient, whose rows span four orders of magnitude."""
    values = random(64, 32, seed=rank) * torch.logspace(0, -4, 64)[:, None]
    return KERNELS.quantize(values, fmt)


def means_at_owners(fmt, owners):
    """This rank's rows in two hops, once for each of `owners` (rows by rank)."""
    with model_parallel_groups() as groups:
        nodes, wire = node_groups(groups, 2), Wire("grads", "fp8", WireCounter(("grads",)))
        gradients, group = {"w": stored(dist.get_rank(), fmt)}, groups.data_parallel
        reduction = HierarchicalReduceScatter(group, nodes.node, nodes.across, wire, KERNELS)
        return [reduction.start(gradients, rows).wait().get("w") for rows in owners]


def emulated(fmt, home):
    """The mean where it belongs to node `home` of two of two ranks."""
    terms = [KERNELS.dequantize(stored(rank, fmt)) for rank in range(4)]
    sums = [terms[0] + terms[1], terms[2] + terms[3]]
    crossed = KERNELS.dequantize(KERNELS.quantize(sums[1 - home], fmt))
    return (sums[home] + crossed) / 4


BLOCKS = [{"w": (16 * rank, 16 * rank + 16)} for rank in range(4)]
STRIPES = [{}, {"w": (0, 8)}, {"w": (24, 64)}, {"w": (8, 24)}]
WITHIN_A_NODE = [{"w": (0, 40)}, {"w": (40, 64)}, {}, {}]
SAME_NUMBER = [{"w": (0, 40)}, {}, {"w": (40, 64)}, {}]
REPLICATED = [[{"w": (0, 64)} if rank == owner else {} for rank in range(4)] for owner in range(4)]


@pytest.mark.parametrize("fmt", [FP32, BF16, E4M3], ids=repr)
def test_only_what_crosses_is_cast_again(fmt, run_distributed):
    results = run_distributed(means_at_owners, 4, fmt, REPLICATED)
    for owner, means in enumerate(results):
        assert torch.equal(means[owner], emulated(fmt, owner // 2))


@pytest.mark.parametrize("fmt", [BF16, E4M3], ids=repr)
def test_the_scale_of_a_sum_is_that_of_the_whole_tensor(fmt, run_distributed):
    """Whoever owns which rows: only the machine on which they are owned makes a difference."""
    divisions = [BLOCKS, STRIPES, WITHIN_A_NODE, SAME_NUMBER]
    for rank, means in enumerate(run_distributed(means_at_owners, 4, fmt, divisions)):
        for owners, mean in zip(divisions, means, strict=True):
            if rows := owners[rank].get("w"):
                assert torch.equal(mean, emulated(fmt, rank // 2)[slice(*rows)])


def test_a_bucket_of_which_some_own_nothing(run_distributed):
    owners = [("b", [0]), ("v", [2]), ("bv", [0, 2])]
    for names, ranks in owners:
        results = run_distributed(reduce, 4, FP32, names)
        assert [rank for rank, ((_, _), (two, _)) in enumerate(results) if two] == ranks
        for (flat, _), (two, _) in results:
            assert all(torch.allclose(two[name], mean) for name, mean in flat.items())


def test_bytes_of_both_hops(run_distributed):
    for rank, ((_, flat), (_, two)) in enumerate(run_distributed(reduce, 4, E4M3)):
        size = [16 * 32 + 32, 24 * 32, 16 * 16, 24 * 32]  # of what each rank owns
        padded = [n + 16 for n in size]
        assert flat == sum(padded) - padded[rank]
        neighbour, opposite = rank ^ 1, rank ^ 2
        within = size[neighbour] + size[neighbour ^ 2]
        assert within <= two - padded[opposite] <= within + 32


def test_one_node_or_one_rank_per_node_is_flat(run_distributed):
    assert run_distributed(flat_groups, 4) == [(None, None)] * 4


def flat_groups():
    with model_parallel_groups() as groups:
        return node_groups(groups, 1), node_groups(groups, 4)


def uneven():
    with model_parallel_groups() as groups, pytest.raises(InputError) as caught:
        node_groups(groups, 3)
    return str(caught.value)


def test_uneven_nodes_are_refused(run_distributed):
    for message in run_distributed(uneven, 4):
        assert "parallel.node_size = 3 does not divide 4 data-parallel ranks" in message
